pass: calibrate-mse
values: {a_input_amax: 1, b_input_amax: 1}
rewrites: 1
--- before
%x : bf16[4,32] = placeholder()
%a : bf16[16,32] = @a.weight
%a_amax : f32[] = fxq.amax(%a)
%a_q : bf16[16,32] = fxq.quantize(%a, %a_amax, format='fp8', scale='max')
%a_input_amax : f32[] = fxq.amax(%x)
%a_input_q : bf16[4,32] = fxq.quantize(%x, %a_input_amax, format='fp8', scale='static')
%y : bf16[4,16] = aten.linear(%a_input_q, %a_q)
%b : bf16[16,32] = @b.weight
%b_amax : f32[] = fxq.amax(%b)
%b_q : bf16[16,32] = fxq.quantize(%b, %b_amax, format='nvfp4', scale='max')
%b_input_amax : f32[] = fxq.amax(%x)
%b_input_q : bf16[4,32] = fxq.quantize(%x, %b_input_amax, format='nvfp4', scale='dynamic')
%z : bf16[4,16] = aten.linear(%b_input_q, %b_q)
%total : bf16[4,16] = aten.add.Tensor(%y, %z)
return [%total]
--- miss
a_q: fp8 has one scale
--- after
%x : bf16[4,32] = placeholder()
%a : bf16[16,32] = @a.weight
%a_amax : f32[] = fxq.amax(%a)
%a_q : bf16[16,32] = fxq.quantize(%a, %a_amax, format='fp8', scale='max')
%a_input_amax : f32[] = fxq.amax(%x)  # = 1
%a_input_q : bf16[4,32] = fxq.quantize(%x, %a_input_amax, format='fp8', scale='static')
%y : bf16[4,16] = aten.linear(%a_input_q, %a_q)
%b : bf16[16,32] = @b.weight
%b_amax : f32[] = fxq.amax(%b)
%b_q : bf16[16,32] = fxq.quantize(%b, %b_amax, format='nvfp4', scale='mse')
%b_input_amax : f32[] = fxq.amax(%x)  # = 1
%b_input_q : bf16[4,32] = fxq.quantize(%x, %b_input_amax, format='nvfp4', scale='dynamic')
%z : bf16[4,16] = aten.linear(%b_input_q, %b_q)
%total : bf16[4,16] = aten.add.Tensor(%y, %z)
return [%total]
