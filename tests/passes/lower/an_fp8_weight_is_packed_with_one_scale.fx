pass: lower
values: {a_input_amax: 1, b_input_amax: 1}
rewrites: 2
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
--- after
%a_input_amax : f32[] = fxq.value('a_input_amax')  # = 1
%a : bf16[16,32] = @a.weight
%a_amax : f32[] = fxq.amax(%a)
%a_packed : [f8e4m3[16,32], f32[]] = fxq.pack(%a, %a_amax, format='fp8', scale='max')
%a_packed_0 : none = fxq.store_linear('a', %a_packed, %a_input_amax, start=0, end=16)
%b_input_amax : f32[] = fxq.value('b_input_amax')  # = 1
%b : bf16[16,32] = @b.weight
%b_amax : f32[] = fxq.amax(%b)
%b_packed : [u8[16,16], f8e4m3[16,2], f32[]] = fxq.pack(%b, %b_amax, format='nvfp4', scale='max')
%b_packed_0 : none = fxq.store_linear('b', %b_packed, %b_input_amax, start=0, end=16)
return ()
