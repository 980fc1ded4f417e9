pass: retarget
rewrites: 1
--- before
%x : bf16[4,32] = placeholder()
%x_amax : f32[] = fxq.amax(%x)
%x_q : bf16[4,32] = fxq.quantize(%x, %x_amax, format='fp8', scale='static')
%w : bf16[48,32] = @q.weight
%w_amax : f32[] = fxq.amax(%w)
%w_q : bf16[48,32] = fxq.quantize(%w, %w_amax, format='fp8', scale='max')
%y : bf16[4,48] = aten.linear(%x_q, %w_q)
return [%y]
--- after
%x : bf16[4,32] = placeholder()
%x_amax : f32[] = fxq.amax(%x)
%x_q : bf16[4,32] = fxq.quantize(%x, %x_amax, format='fp8', scale='static')
%x_original : bf16[4,32] = fxq.original(%x)
%x_original_split_gram : f32[2,32,32] = fxq.split_gram(%x_original, %x_q)
%x_q_split_gram : f32[2,32,32] = fxq.split_gram(%x_q, %x_q)
%x_q_tokens : i64[] = fxq.tokens(%x_q)
%w : bf16[48,32] = @q.weight
%w_fitted : f32[48,32] = fxq.retarget(%w, %w, %x_original_split_gram, %x_q_split_gram, %x_q_tokens)
%w_new : bf16[48,32] = fxq.rewrite(%w, %w_fitted)
%w_amax : f32[] = fxq.amax(%w_new)
%w_q : bf16[48,32] = fxq.quantize(%w_new, %w_amax, format='fp8', scale='max')
%y : bf16[4,48] = aten.linear(%x_q, %w_q)
return [%y]
