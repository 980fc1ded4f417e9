pass: learn
rewrites: 2
--- before
%x : bf16[4,32] = placeholder()
%g : bf16[32] = @norm.weight
%h : bf16[4,32] = aten.mul.Tensor(%g, %x)
%h_amax : f32[] = fxq.amax(%h)
%h_q : bf16[4,32] = fxq.quantize(%h, %h_amax, format='nvfp4', scale='dynamic')
%w : bf16[16,32] = @up_proj.weight
%w_amax : f32[] = fxq.amax(%w)
%w_q : bf16[16,32] = fxq.quantize(%w, %w_amax, format='nvfp4', scale='mse')
%y : bf16[4,16] = aten.linear(%h_q, %w_q)
return [%y]
--- after
%x : bf16[4,32] = placeholder()
%g_found : bf16[32] = fxq.value('g_found', shape=[32], dtype=torch.bfloat16)
%g : bf16[32] = @norm.weight
%g_new : bf16[32] = fxq.rewrite(%g, %g_found)
%h : bf16[4,32] = aten.mul.Tensor(%g_new, %x)
%h_amax : f32[] = fxq.amax(%h)
%h_q : bf16[4,32] = fxq.quantize(%h, %h_amax, format='nvfp4', scale='dynamic')
%w : bf16[16,32] = @up_proj.weight
%w_amax : f32[] = fxq.amax(%w)
%w_q_codes : u8[16,16] = fxq.value('w_q_codes', shape=[16, 16], dtype=torch.uint8)
%w_q_scales : f8e4m3[16,2] = fxq.value('w_q_scales', shape=[16, 2], dtype=torch.float8_e4m3fn)
%w_q : bf16[16,32] = fxq.rounded(%w, %w_amax, %w_q_codes, %w_q_scales, format='nvfp4')
%y : bf16[4,16] = aten.linear(%h_q, %w_q)
return [%y]
