pass: gptq
rewrites: 1
--- before
%x : bf16[4,32] = placeholder()
%w : bf16[32,32] = @shared.weight
%w_amax : f32[] = fxq.amax(%w)
%w_q : bf16[32,32] = fxq.quantize(%w, %w_amax, format='nvfp4', scale='max')
%y : bf16[4,32] = aten.linear(%x, %w_q)
%z : bf16[4,32] = aten.linear(%y, %w_q)
return [%z]
--- after
%x : bf16[4,32] = placeholder()
%w : bf16[32,32] = @shared.weight
%w_amax : f32[] = fxq.amax(%w)
%x_gram : f32[32,32] = fxq.gram(%x)
%w_q : bf16[32,32] = fxq.gptq(%w, %w_amax, %x_gram, format='nvfp4', damp=0.01, order='blocks', sweeps=2)
%y : bf16[4,32] = aten.linear(%x, %w_q)
%z : bf16[4,32] = aten.linear(%y, %w_q)
return [%z]
--- miss
z: decides its weight already
