pass: choose-formats
rewrites: 1
--- before
%x : bf16[4,32] = placeholder()
%a_input_amax : f32[] = fxq.amax(%x)
%a_input_q : bf16[4,32] = fxq.quantize(%x, %a_input_amax, format='nvfp4', scale='dynamic')
%a : bf16[64,32] = @a.weight
%a_amax : f32[] = fxq.amax(%a)
%b : bf16[32,32] = @b.weight
%b_amax : f32[] = fxq.amax(%b)
%a_group_amax : f32[] = fxq.sync([%a_amax, %b_amax])
%a_q : bf16[64,32] = fxq.quantize(%a, %a_group_amax, format='nvfp4', scale='mse')
%y : bf16[4,64] = aten.linear(%a_input_q, %a_q)
%b_q : bf16[32,32] = fxq.quantize(%b, %a_group_amax, format='nvfp4', scale='mse')
%z : bf16[4,32] = aten.linear(%a_input_q, %b_q)
return [%y, %z]
--- after
%x : bf16[4,32] = placeholder()
%a_input_amax : f32[] = fxq.amax(%x)
%a_input_q : bf16[4,32] = fxq.quantize(%x, %a_input_amax, format='nvfp4', scale='dynamic')
%a : bf16[64,32] = @a.weight
%a_amax : f32[] = fxq.amax(%a)
%b : bf16[32,32] = @b.weight
%b_amax : f32[] = fxq.amax(%b)
%a_group_amax : f32[] = fxq.sync([%a_amax, %b_amax])
%a_q : bf16[64,32] = fxq.quantize(%a, %a_group_amax, format='nvfp4', scale='mse')
%x_fp8_q : bf16[4,32] = fxq.quantize(%x, %a_input_amax, format='fp8', scale='static')
%a_which : i64[] = fxq.value('a_which', dtype=torch.int64)
%a_input_q_choice : bf16[4,32] = fxq.choose([%a_input_q, %x_fp8_q, %x], %a_which)
%a_fp8_q : bf16[64,32] = fxq.quantize(%a, %a_group_amax, format='fp8', scale='max')
%a_choice : bf16[64,32] = fxq.choose([%a_q, %a_fp8_q, %a], %a_which)
%y : bf16[4,64] = aten.linear(%a_input_q_choice, %a_choice)
%b_q : bf16[32,32] = fxq.quantize(%b, %a_group_amax, format='nvfp4', scale='mse')
%b_fp8_q : bf16[32,32] = fxq.quantize(%b, %a_group_amax, format='fp8', scale='max')
%b_choice : bf16[32,32] = fxq.choose([%b_q, %b_fp8_q, %b], %a_which)
%z : bf16[4,32] = aten.linear(%a_input_q_choice, %b_choice)
return [%y, %z]
