pass: fuse-experts
rewrites: 1
--- before
%x : bf16[4,32] = placeholder()
%ids : i64[4] = placeholder()
%w : bf16[3,16,32] = @mlp.experts.gate_up_proj
%picked : bf16[4,16,32] = aten.index.Tensor(%w, [%ids])
%column : bf16[4,32,1] = aten.unsqueeze(%x, -1)
%y : bf16[4,16,1] = aten.bmm(%picked, %column)
%z : bf16[4,16] = aten.squeeze.dim(%y, -1)
return [%z]
--- after
%x : bf16[4,32] = placeholder()
%ids : i64[4] = placeholder()
%w : bf16[3,16,32] = @mlp.experts.gate_up_proj
%y_experts : bf16[4,16] = fxq.expert_linear(%x, %w, %ids)
return [%y_experts]
