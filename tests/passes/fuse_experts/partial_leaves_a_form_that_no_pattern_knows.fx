pass: fuse-experts
options: {partial: true}
rewrites: 1
--- before
%x : bf16[4,32] = placeholder()
%ids : i64[4] = placeholder()
%w : bf16[3,16,32] = @layers.0.experts.w
%y : bf16[3,4,16] = aten.einsum('ti,eoi->eto', [%x, %w])
%w1 : bf16[3,16,32] = @layers.1.experts.w
%w_sel : bf16[4,16,32] = aten.index.Tensor(%w1, [%ids])
%x_col : bf16[4,32,1] = aten.unsqueeze(%x, -1)
%z_col : bf16[4,16,1] = aten.bmm(%w_sel, %x_col)
%z : bf16[4,16] = aten.squeeze.dim(%z_col, -1)
return [%y, %z]
--- after
%x : bf16[4,32] = placeholder()
%ids : i64[4] = placeholder()
%w : bf16[3,16,32] = @layers.0.experts.w
%y : bf16[3,4,16] = aten.einsum('ti,eoi->eto', [%x, %w])
%w1 : bf16[3,16,32] = @layers.1.experts.w
%z_col_experts : bf16[4,16] = fxq.expert_linear(%x, %w1, %ids)
return [%y, %z_col_experts]
