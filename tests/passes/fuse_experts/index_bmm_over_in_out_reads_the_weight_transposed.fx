pass: fuse-experts
rewrites: 1
--- before
%x : bf16[4,32] = placeholder()
%ids : i64[4] = placeholder()
%row : bf16[4,1,32] = aten.unsqueeze(%x, 1)
%w : bf16[3,32,16] = @mlp.experts.gate_up_proj
%picked : bf16[4,32,16] = aten.index.Tensor(%w, [%ids])
%y : bf16[4,1,16] = aten.bmm(%row, %picked)
%z : bf16[4,16] = aten.squeeze.dim(%y, 1)
return [%z]
--- after
%x : bf16[4,32] = placeholder()
%ids : i64[4] = placeholder()
%w : bf16[3,32,16] = @mlp.experts.gate_up_proj
%w_t : bf16[3,16,32] = aten.transpose.int(%w, 1, 2)
%y_experts : bf16[4,16] = fxq.expert_linear(%x, %w_t, %ids)
return [%y_experts]
