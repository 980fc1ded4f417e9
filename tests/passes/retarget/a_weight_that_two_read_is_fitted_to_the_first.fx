pass: retarget
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
%x_original : bf16[4,32] = fxq.original(%x)
%x_original_split_gram : f32[2,32,32] = fxq.split_gram(%x_original, %x)
%x_split_gram : f32[2,32,32] = fxq.split_gram(%x, %x)
%x_tokens : i64[] = fxq.tokens(%x)
%w : bf16[32,32] = @shared.weight
%w_fitted : f32[32,32] = fxq.retarget(%w, %w, %x_original_split_gram, %x_split_gram, %x_tokens)
%w_new : bf16[32,32] = fxq.rewrite(%w, %w_fitted)
%w_amax : f32[] = fxq.amax(%w_new)
%w_q : bf16[32,32] = fxq.quantize(%w_new, %w_amax, format='nvfp4', scale='max')
%y : bf16[4,32] = aten.linear(%x, %w_q)
%z : bf16[4,32] = aten.linear(%y, %w_q)
return [%z]
--- miss
z: decides its weight already
