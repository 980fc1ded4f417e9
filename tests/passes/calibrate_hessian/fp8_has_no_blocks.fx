pass: calibrate-hessian
--- before
%x : bf16[4,32] = placeholder()
%x_amax : f32[] = fxq.amax(%x)
%x_q : bf16[4,32] = fxq.quantize(%x, %x_amax, format='fp8', scale='static')
%w : bf16[48,32] = @q.weight
%w_amax : f32[] = fxq.amax(%w)
%w_q : bf16[48,32] = fxq.quantize(%w, %w_amax, format='fp8', scale='max')
%y : bf16[4,48] = aten.linear(%x_q, %w_q)
return [%y]
--- miss
y: one scale
--- error
VerifyError: calibrate-hessian rewrote nothing
