pass: gptq
options: {damp: 0.05, order: none, sweeps: 0}
rewrites: 1
--- before
%x : bf16[4,32] = placeholder()
%w : bf16[48,32] = @q.weight
%w_amax : f32[] = fxq.amax(%w)
%w_q : bf16[48,32] = fxq.quantize(%w, %w_amax, format='nvfp4', scale='max')
%y : bf16[4,48] = aten.linear(%x, %w_q)
return [%y]
--- after
%x : bf16[4,32] = placeholder()
%w : bf16[48,32] = @q.weight
%w_amax : f32[] = fxq.amax(%w)
%x_gram : f32[32,32] = fxq.gram(%x)
%w_q : bf16[48,32] = fxq.gptq(%w, %w_amax, %x_gram, format='nvfp4', damp=0.05, order='none', sweeps=0)
%y : bf16[4,48] = aten.linear(%x, %w_q)
return [%y]
