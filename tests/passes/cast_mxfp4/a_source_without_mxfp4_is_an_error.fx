pass: cast-mxfp4
--- before
%x : bf16[4,32] = placeholder()
%w : bf16[32,32] = @w
%w_amax : f32[] = fxq.amax(%w)
%w_q : bf16[32,32] = fxq.quantize(%w, %w_amax, format='nvfp4', scale='max')
%y : bf16[4,32] = aten.linear(%x, %w_q)
return [%y]
--- error
VerifyError: cast-mxfp4 rewrote nothing: expected NVFP4 weights that the source holds in MXFP4
%w_q: the source holds it in plain numbers, not in MXFP4
