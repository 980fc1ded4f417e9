pass: fold-scales
rewrites: 1
--- before
%h : bf16[2,4,32] = placeholder()
%h_f : f32[2,4,32] = aten._to_copy(%h, dtype=torch.float32)
%g : bf16[32] = @norm.weight
%g_f : f32[32] = aten._to_copy(%g, dtype=torch.float32)
%factor : f32[32] = aten.add.Tensor(%g_f, 1.0)
%product : f32[2,4,32] = aten.mul.Tensor(%h_f, %factor)
%x : bf16[2,4,32] = aten._to_copy(%product, dtype=torch.bfloat16)
%w : bf16[48,32] = @up.weight
%w_amax : f32[] = fxq.amax(%w)
%w_q : bf16[48,32] = fxq.quantize(%w, %w_amax, format='nvfp4', scale='max')
%y : bf16[2,4,48] = aten.linear(%x, %w_q)
return [%y]
--- after
%h : bf16[2,4,32] = placeholder()
%h_f : f32[2,4,32] = aten._to_copy(%h, dtype=torch.float32)
%g : bf16[32] = @norm.weight
%g_f_unfolded : f32[32] = aten._to_copy(%g, dtype=torch.float32)
%factor_unfolded : f32[32] = aten.add.Tensor(%g_f_unfolded, 1.0)
%product_unfolded : f32[2,4,32] = aten.mul.Tensor(%h_f, %factor_unfolded)
%product_sample : f32[1024,32] = fxq.sample(%product_unfolded)
%w : bf16[48,32] = @up.weight
%product_fold : f32[32] = fxq.fold_scale(%product_sample, [%w], inputs=False)
%g_divided : f32[32] = aten.div.Tensor(%factor_unfolded, %product_fold)
%g_less : f32[32] = aten.sub.Tensor(%g_divided, 1.0)
%g_folded : bf16[32] = fxq.rewrite(%g, %g_less)
%g_f : f32[32] = aten._to_copy(%g_folded, dtype=torch.float32)
%factor : f32[32] = aten.add.Tensor(%g_f, 1.0)
%product : f32[2,4,32] = aten.mul.Tensor(%h_f, %factor)
%x : bf16[2,4,32] = aten._to_copy(%product, dtype=torch.bfloat16)
%w_scaled : f32[48,32] = aten.mul.Tensor(%w, %product_fold)
%w_folded : bf16[48,32] = fxq.rewrite(%w, %w_scaled)
%w_amax : f32[] = fxq.amax(%w_folded)
%w_q : bf16[48,32] = fxq.quantize(%w_folded, %w_amax, format='nvfp4', scale='max')
%y : bf16[2,4,48] = aten.linear(%x, %w_q)
return [%y]
