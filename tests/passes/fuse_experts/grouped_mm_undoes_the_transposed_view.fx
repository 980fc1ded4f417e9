pass: fuse-experts
rewrites: 1
inputs: {ids: [0, 0, 1, 2]}
--- before
%x : bf16[4,32] = placeholder()
%ids : i64[4] = placeholder()
%w : bf16[3,16,32] = @mlp.experts.gate_up_proj
%wt : bf16[3,32,16] = aten.transpose.int(%w, -2, -1)
%f : f32[4] = aten._to_copy(%ids, dtype=torch.float32)
%counts : f32[3] = aten.histc(%f, 3, 0, 2)
%offsets : i32[3] = aten.cumsum(%counts, 0, dtype=torch.int32)
%y : bf16[4,16] = aten._grouped_mm(%x, %wt, %offsets)
return [%y]
--- after
%x : bf16[4,32] = placeholder()
%ids : i64[4] = placeholder()
%w : bf16[3,16,32] = @mlp.experts.gate_up_proj
%y_experts : bf16[4,16] = fxq.expert_linear(%x, %w, %ids)
return [%y_experts]
