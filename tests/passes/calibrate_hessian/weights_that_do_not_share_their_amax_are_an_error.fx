pass: calibrate-hessian
--- before
%x : bf16[2,4,32] = placeholder()
%x_amax : f32[] = fxq.amax(%x)
%x_q : bf16[2,4,32] = fxq.quantize(%x, %x_amax, format='nvfp4', scale='dynamic')
%w : bf16[48,32] = @q.weight
%w_amax : f32[] = fxq.amax(%w)
%v : bf16[16,32] = @k.weight
%v_amax : f32[] = fxq.amax(%v)
%w_q : bf16[48,32] = fxq.quantize(%w, %w_amax, format='nvfp4', scale='max')
%y : bf16[2,4,48] = aten.linear(%x_q, %w_q)
%v_q : bf16[16,32] = fxq.quantize(%v, %v_amax, format='nvfp4', scale='max')
%z : bf16[2,4,16] = aten.linear(%x_q, %v_q)
return [%y, %z]
--- error
VerifyError: calibrate-hessian requires amaxes_shared
