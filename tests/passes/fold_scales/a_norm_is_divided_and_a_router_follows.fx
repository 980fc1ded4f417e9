pass: fold-scales
rewrites: 1
--- before
%h : bf16[2,4,32] = placeholder()
%h_f : f32[2,4,32] = aten._to_copy(%h, dtype=torch.float32)
%square : f32[2,4,32] = aten.pow.Tensor_Scalar(%h_f, 2)
%mean : f32[2,4,1] = aten.mean.dim(%square, [-1], True)
%eps : f32[2,4,1] = aten.add.Tensor(%mean, 1e-06)
%rsqrt : f32[2,4,1] = aten.rsqrt(%eps)
%normed : f32[2,4,32] = aten.mul.Tensor(%h_f, %rsqrt)
%n : bf16[2,4,32] = aten._to_copy(%normed, dtype=torch.bfloat16)
%g : bf16[32] = @norm.weight
%x : bf16[2,4,32] = aten.mul.Tensor(%g, %n)
%router : bf16[2,32] = @router.weight
%choice : bf16[2,4,2] = aten.linear(%x, %router)
%x_amax : f32[] = fxq.amax(%x)
%x_q : bf16[2,4,32] = fxq.quantize(%x, %x_amax, format='nvfp4', scale='dynamic')
%w : bf16[48,32] = @up.weight
%w_amax : f32[] = fxq.amax(%w)
%w_q : bf16[48,32] = fxq.quantize(%w, %w_amax, format='nvfp4', scale='max')
%y : bf16[2,4,48] = aten.linear(%x_q, %w_q)
return [%y, %choice]
--- after
%h : bf16[2,4,32] = placeholder()
%h_f : f32[2,4,32] = aten._to_copy(%h, dtype=torch.float32)
%square : f32[2,4,32] = aten.pow.Tensor_Scalar(%h_f, 2)
%mean : f32[2,4,1] = aten.mean.dim(%square, [-1], True)
%eps : f32[2,4,1] = aten.add.Tensor(%mean, 1e-06)
%rsqrt : f32[2,4,1] = aten.rsqrt(%eps)
%normed : f32[2,4,32] = aten.mul.Tensor(%h_f, %rsqrt)
%n : bf16[2,4,32] = aten._to_copy(%normed, dtype=torch.bfloat16)
%g : bf16[32] = @norm.weight
%x_unfolded : bf16[2,4,32] = aten.mul.Tensor(%g, %n)
%x_sample : f32[1024,32] = fxq.sample(%x_unfolded)
%w : bf16[48,32] = @up.weight
%x_fold : f32[32] = fxq.fold_scale(%x_sample, [%w], inputs=True)
%g_divided : f32[32] = aten.div.Tensor(%g, %x_fold)
%g_folded : bf16[32] = fxq.rewrite(%g, %g_divided)
%x : bf16[2,4,32] = aten.mul.Tensor(%g_folded, %n)
%router : bf16[2,32] = @router.weight
%router_scaled : f32[2,32] = aten.mul.Tensor(%router, %x_fold)
%router_folded : bf16[2,32] = fxq.rewrite(%router, %router_scaled)
%choice : bf16[2,4,2] = aten.linear(%x, %router_folded)
%x_amax : f32[] = fxq.amax(%x)
%x_q : bf16[2,4,32] = fxq.quantize(%x, %x_amax, format='nvfp4', scale='dynamic')
%w_scaled : f32[48,32] = aten.mul.Tensor(%w, %x_fold)
%w_folded : bf16[48,32] = fxq.rewrite(%w, %w_scaled)
%w_amax : f32[] = fxq.amax(%w_folded)
%w_q : bf16[48,32] = fxq.quantize(%w_folded, %w_amax, format='nvfp4', scale='max')
%y : bf16[2,4,48] = aten.linear(%x_q, %w_q)
return [%y, %choice]
