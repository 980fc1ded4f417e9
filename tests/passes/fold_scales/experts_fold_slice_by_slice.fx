pass: fold-scales
rewrites: 1
--- before
%h : bf16[4,32] = placeholder()
%tokens : i64[8] = placeholder()
%ids : i64[8] = placeholder()
%g : bf16[32] = @norm.weight
%x : bf16[4,32] = aten.mul.Tensor(%g, %h)
%rows : bf16[8,32] = aten.index.Tensor(%x, [%tokens])
%w : bf16[2,16,32] = @experts.up_proj
%w_e0 : bf16[16,32] = fxq.slice(%w, 0)
%w_e0_amax : f32[] = fxq.amax(%w_e0)
%w_e0_q : bf16[16,32] = fxq.quantize(%w_e0, %w_e0_amax, format='nvfp4', scale='max')
%w_e1 : bf16[16,32] = fxq.slice(%w, 1)
%w_e1_amax : f32[] = fxq.amax(%w_e1)
%w_e1_q : bf16[16,32] = fxq.quantize(%w_e1, %w_e1_amax, format='nvfp4', scale='max')
%w_q : bf16[2,16,32] = fxq.stack([%w_e0_q, %w_e1_q])
%y : bf16[8,16] = fxq.expert_linear(%rows, %w_q, %ids)
return [%y]
--- after
%h : bf16[4,32] = placeholder()
%tokens : i64[8] = placeholder()
%ids : i64[8] = placeholder()
%g : bf16[32] = @norm.weight
%x_unfolded : bf16[4,32] = aten.mul.Tensor(%g, %h)
%x_sample : f32[1024,32] = fxq.sample(%x_unfolded)
%w : bf16[2,16,32] = @experts.up_proj
%w_e0 : bf16[16,32] = fxq.slice(%w, 0)
%w_e1 : bf16[16,32] = fxq.slice(%w, 1)
%x_fold : f32[32] = fxq.fold_scale(%x_sample, [%w_e0, %w_e1], inputs=False)
%g_divided : f32[32] = aten.div.Tensor(%g, %x_fold)
%g_folded : bf16[32] = fxq.rewrite(%g, %g_divided)
%x : bf16[4,32] = aten.mul.Tensor(%g_folded, %h)
%rows : bf16[8,32] = aten.index.Tensor(%x, [%tokens])
%w_e0_scaled : f32[16,32] = aten.mul.Tensor(%w_e0, %x_fold)
%w_e0_folded : bf16[16,32] = fxq.rewrite(%w_e0, %w_e0_scaled)
%w_e0_amax : f32[] = fxq.amax(%w_e0_folded)
%w_e0_q : bf16[16,32] = fxq.quantize(%w_e0_folded, %w_e0_amax, format='nvfp4', scale='max')
%w_e1_scaled : f32[16,32] = aten.mul.Tensor(%w_e1, %x_fold)
%w_e1_folded : bf16[16,32] = fxq.rewrite(%w_e1, %w_e1_scaled)
%w_e1_amax : f32[] = fxq.amax(%w_e1_folded)
%w_e1_q : bf16[16,32] = fxq.quantize(%w_e1_folded, %w_e1_amax, format='nvfp4', scale='max')
%w_q : bf16[2,16,32] = fxq.stack([%w_e0_q, %w_e1_q])
%y : bf16[8,16] = fxq.expert_linear(%rows, %w_q, %ids)
return [%y]
