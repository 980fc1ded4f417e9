pass: calibrate-hessian
rewrites: 2
--- before
%x : bf16[2,4,32] = placeholder()
%x_amax : f32[] = fxq.amax(%x)
%x_q : bf16[2,4,32] = fxq.quantize(%x, %x_amax, format='nvfp4', scale='dynamic')
%w : bf16[48,32] = @q.weight
%w_amax : f32[] = fxq.amax(%w)
%v : bf16[16,32] = @k.weight
%v_amax : f32[] = fxq.amax(%v)
%sync : f32[] = fxq.sync([%w_amax, %v_amax])
%w_q : bf16[48,32] = fxq.quantize(%w, %sync, format='nvfp4', scale='max')
%y : bf16[2,4,48] = aten.linear(%x_q, %w_q)
%v_q : bf16[16,32] = fxq.quantize(%v, %sync, format='nvfp4', scale='max')
%z : bf16[2,4,16] = aten.linear(%x_q, %v_q)
return [%y, %z]
--- after
%x : bf16[2,4,32] = placeholder()
%x_amax : f32[] = fxq.amax(%x)
%x_q : bf16[2,4,32] = fxq.quantize(%x, %x_amax, format='nvfp4', scale='dynamic')
%w : bf16[48,32] = @q.weight
%w_amax : f32[] = fxq.amax(%w)
%v : bf16[16,32] = @k.weight
%v_amax : f32[] = fxq.amax(%v)
%sync : f32[] = fxq.sync([%w_amax, %v_amax])
%x_q_gram_blocks : f32[2,16,16] = fxq.gram_blocks(%x_q)
%w_q : bf16[48,32] = fxq.quantize_weighted(%w, %sync, %x_q_gram_blocks, format='nvfp4')
%y : bf16[2,4,48] = aten.linear(%x_q, %w_q)
%v_q : bf16[16,32] = fxq.quantize_weighted(%v, %sync, %x_q_gram_blocks, format='nvfp4')
%z : bf16[2,4,16] = aten.linear(%x_q, %v_q)
return [%y, %z]
