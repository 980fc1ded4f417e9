pass: learn
options: {norms: false}
rewrites: 1
--- before
%x : bf16[4,32] = placeholder()
%g : bf16[32] = @norm.weight
%plain : bf16[4,32] = aten.mul.Tensor(%g, %x)
%s : f32[32] = fxq.square_sum(%plain)
%g_divided : f32[32] = aten.div.Tensor(%g, %s)
%g_folded : bf16[32] = fxq.rewrite(%g, %g_divided)
%h : bf16[4,32] = aten.mul.Tensor(%g_folded, %x)
%h_amax : f32[] = fxq.amax(%h)
%h_q : bf16[4,32] = fxq.quantize(%h, %h_amax, format='nvfp4', scale='dynamic')
%w : bf16[16,32] = @up_proj.weight
%w_scaled : f32[16,32] = aten.mul.Tensor(%w, %s)
%w_folded : bf16[16,32] = fxq.rewrite(%w, %w_scaled)
%h_q_gram : f32[32,32] = fxq.gram(%h_q)
%w_fitted : f32[16,32] = aten.mm(%w_scaled, %h_q_gram)
%w_folded_new : bf16[16,32] = fxq.rewrite(%w_folded, %w_fitted)
%w_folded_new_amax : f32[] = fxq.amax(%w_folded_new)
%w_q : bf16[16,32] = fxq.gptq(%w_folded_new, %w_folded_new_amax, %h_q_gram, format='nvfp4', damp=0.01, order='blocks', sweeps=2)
%y : bf16[4,16] = aten.linear(%h_q, %w_q)
return [%y]
--- after
%x : bf16[4,32] = placeholder()
%g : bf16[32] = @norm.weight
%plain : bf16[4,32] = aten.mul.Tensor(%g, %x)
%s : f32[32] = fxq.square_sum(%plain)
%g_divided : f32[32] = aten.div.Tensor(%g, %s)
%g_folded : bf16[32] = fxq.rewrite(%g, %g_divided)
%h : bf16[4,32] = aten.mul.Tensor(%g_folded, %x)
%h_amax : f32[] = fxq.amax(%h)
%h_q : bf16[4,32] = fxq.quantize(%h, %h_amax, format='nvfp4', scale='dynamic')
%w : bf16[16,32] = @up_proj.weight
%w_scaled : f32[16,32] = aten.mul.Tensor(%w, %s)
%w_folded : bf16[16,32] = fxq.rewrite(%w, %w_scaled)
%w_folded_new_amax_found : f32[] = fxq.value('w_folded_new_amax_found')
%w_q_codes : u8[16,16] = fxq.value('w_q_codes', shape=[16, 16], dtype=torch.uint8)
%w_q_scales : f8e4m3[16,2] = fxq.value('w_q_scales', shape=[16, 2], dtype=torch.float8_e4m3fn)
%w_q : bf16[16,32] = fxq.rounded(%w_folded, %w_folded_new_amax_found, %w_q_codes, %w_q_scales, format='nvfp4')
%y : bf16[4,16] = aten.linear(%h_q, %w_q)
return [%y]
