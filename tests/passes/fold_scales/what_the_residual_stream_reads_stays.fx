pass: fold-scales
rewrites: 0
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
%out : bf16[2,4,32] = aten.add.Tensor(%x, %h)
return [%y, %out]
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
%x : bf16[2,4,32] = aten.mul.Tensor(%g, %n)
%x_amax : f32[] = fxq.amax(%x)
%x_q : bf16[2,4,32] = fxq.quantize(%x, %x_amax, format='nvfp4', scale='dynamic')
%w : bf16[48,32] = @up.weight
%w_amax : f32[] = fxq.amax(%w)
%w_q : bf16[48,32] = fxq.quantize(%w, %w_amax, format='nvfp4', scale='max')
%y : bf16[2,4,48] = aten.linear(%x_q, %w_q)
%out : bf16[2,4,32] = aten.add.Tensor(%x, %h)
return [%y, %out]
--- miss
x: which is no linear
