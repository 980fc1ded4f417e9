pass: sync-groups
rewrites: 0
--- before
%x : bf16[4,32] = placeholder()
%a_input_amax : f32[] = fxq.amax(%x)
%a_input_q : bf16[4,32] = fxq.quantize(%x, %a_input_amax, format='nvfp4', scale='dynamic')
%a : bf16[16,32] = @a.weight
%a_amax : f32[] = fxq.amax(%a)
%a_q : bf16[16,32] = fxq.quantize(%a, %a_amax, format='nvfp4', scale='max')
%y : bf16[4,16] = aten.linear(%a_input_q, %a_q)
%b : bf16[16,32] = @b.weight
%z : bf16[4,16] = aten.linear(%x, %b)
return [%y, %z]
--- after
%x : bf16[4,32] = placeholder()
%a_input_amax : f32[] = fxq.amax(%x)
%a_input_q : bf16[4,32] = fxq.quantize(%x, %a_input_amax, format='nvfp4', scale='dynamic')
%a : bf16[16,32] = @a.weight
%a_amax : f32[] = fxq.amax(%a)
%a_q : bf16[16,32] = fxq.quantize(%a, %a_amax, format='nvfp4', scale='max')
%y : bf16[4,16] = aten.linear(%a_input_q, %a_q)
%b : bf16[16,32] = @b.weight
%z : bf16[4,16] = aten.linear(%x, %b)
return [%y, %z]
