pass: resolve-choices
values: {a_which: 2}
--- before
%x : bf16[4,32] = placeholder()
%a_which : i64[] = fxq.value('a_which', dtype=torch.int64)
%x_amax : f32[] = fxq.amax(%x)
%x_q : bf16[4,32] = fxq.quantize(%x, %x_amax, format='nvfp4', scale='dynamic')
%x_fp8 : bf16[4,32] = fxq.quantize(%x, %x_amax, format='fp8', scale='static')
%x_q_choice : bf16[4,32] = fxq.choose([%x_q, %x_fp8, %x], %a_which)
%a : bf16[64,32] = @a.weight
%a_amax : f32[] = fxq.amax(%a)
%a_q : bf16[64,32] = fxq.quantize(%a, %a_amax, format='nvfp4', scale='mse')
%a_fp8 : bf16[64,32] = fxq.quantize(%a, %a_amax, format='fp8', scale='max')
%a_choice : bf16[64,32] = fxq.choose([%a_q, %a_fp8, %a], %a_which)
%y : bf16[4,64] = aten.linear(%x_q_choice, %a_choice)
return [%y]
--- after
%x : bf16[4,32] = placeholder()
%a : bf16[64,32] = @a.weight
%y : bf16[4,64] = aten.linear(%x, %a)
return [%y]
