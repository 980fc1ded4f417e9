pass: retarget
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
%x_original : bf16[2,4,32] = fxq.original(%x)
%x_original_split_gram : f32[2,32,32] = fxq.split_gram(%x_original, %x_q)
%x_q_split_gram : f32[2,32,32] = fxq.split_gram(%x_q, %x_q)
%x_q_tokens : i64[] = fxq.tokens(%x_q)
%w : bf16[48,32] = @q.weight
%w_fitted : f32[48,32] = fxq.retarget(%w, %w, %x_original_split_gram, %x_q_split_gram, %x_q_tokens)
%w_new : bf16[48,32] = fxq.rewrite(%w, %w_fitted)
%w_amax : f32[] = fxq.amax(%w_new)
%v : bf16[16,32] = @k.weight
%v_fitted : f32[16,32] = fxq.retarget(%v, %v, %x_original_split_gram, %x_q_split_gram, %x_q_tokens)
%v_new : bf16[16,32] = fxq.rewrite(%v, %v_fitted)
%v_amax : f32[] = fxq.amax(%v_new)
%sync : f32[] = fxq.sync([%w_amax, %v_amax])
%w_q : bf16[48,32] = fxq.quantize(%w_new, %sync, format='nvfp4', scale='max')
%y : bf16[2,4,48] = aten.linear(%x_q, %w_q)
%v_q : bf16[16,32] = fxq.quantize(%v_new, %sync, format='nvfp4', scale='max')
%z : bf16[2,4,16] = aten.linear(%x_q, %v_q)
return [%y, %z]
