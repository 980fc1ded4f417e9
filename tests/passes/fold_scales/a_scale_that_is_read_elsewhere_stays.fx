pass: fold-scales
rewrites: 0
--- before
%h : bf16[4,32] = placeholder()
%g : bf16[32] = @norm.weight
%g_f : f32[32] = aten._to_copy(%g, dtype=torch.float32)
%product : f32[4,32] = aten.mul.Tensor(%h, %g_f)
%x : bf16[4,32] = aten._to_copy(%product, dtype=torch.bfloat16)
%w : bf16[48,32] = @up.weight
%w_amax : f32[] = fxq.amax(%w)
%w_q : bf16[48,32] = fxq.quantize(%w, %w_amax, format='nvfp4', scale='max')
%y : bf16[4,48] = aten.linear(%x, %w_q)
%z : f32[32] = aten.add.Tensor(%g_f, 2.0)
return [%y, %z]
--- after
%h : bf16[4,32] = placeholder()
%g : bf16[32] = @norm.weight
%g_f : f32[32] = aten._to_copy(%g, dtype=torch.float32)
%product : f32[4,32] = aten.mul.Tensor(%h, %g_f)
%x : bf16[4,32] = aten._to_copy(%product, dtype=torch.bfloat16)
%w : bf16[48,32] = @up.weight
%w_amax : f32[] = fxq.amax(%w)
%w_q : bf16[48,32] = fxq.quantize(%w, %w_amax, format='nvfp4', scale='max')
%y : bf16[4,48] = aten.linear(%x, %w_q)
%z : f32[32] = aten.add.Tensor(%g_f, 2.0)
return [%y, %z]
--- miss
product: other readers
