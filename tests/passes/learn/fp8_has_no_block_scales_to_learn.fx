pass: learn
--- before
%x : bf16[4,32] = placeholder()
%x_amax : f32[] = fxq.amax(%x)
%x_q : bf16[4,32] = fxq.quantize(%x, %x_amax, format='fp8', scale='static')
%w : bf16[16,32] = @up_proj.weight
%w_amax : f32[] = fxq.amax(%w)
%w_q : bf16[16,32] = fxq.quantize(%w, %w_amax, format='fp8', scale='max')
%y : bf16[4,16] = aten.linear(%x_q, %w_q)
return [%y]
--- error
VerifyError: learn rewrote nothing: expected NVFP4 weights, found none
fp8 has no block scales to learn
