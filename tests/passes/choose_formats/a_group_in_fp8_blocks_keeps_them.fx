pass: choose-formats
options: {bits: 8.0}
rewrites: 2
--- before
%x : bf16[4,128] = placeholder()
%x_amax : f32[] = aten.scalar_tensor(1.0, dtype=torch.float32)
%x_q : bf16[4,128] = fxq.quantize(%x, %x_amax, format='fp8_blocks', scale='dynamic')
%a : bf16[128,128] = @a.weight
%a_amax : f32[] = aten.scalar_tensor(1.0, dtype=torch.float32)
%a_q : bf16[128,128] = fxq.quantize(%a, %a_amax, format='fp8_blocks', scale='max')
%y : bf16[4,128] = aten.linear(%x_q, %a_q)
%y_amax : f32[] = fxq.amax(%y)
%y_q : bf16[4,128] = fxq.quantize(%y, %y_amax, format='nvfp4', scale='dynamic')
%b : bf16[128,128] = @b.weight
%b_amax : f32[] = fxq.amax(%b)
%b_q : bf16[128,128] = fxq.quantize(%b, %b_amax, format='nvfp4', scale='max')
%z : bf16[4,128] = aten.linear(%y_q, %b_q)
return [%z]
--- after
%x : bf16[4,128] = placeholder()
%x_amax : f32[] = aten.scalar_tensor(1.0, dtype=torch.float32)
%x_q : bf16[4,128] = fxq.quantize(%x, %x_amax, format='fp8_blocks', scale='dynamic')
%a_amax : f32[] = aten.scalar_tensor(1.0, dtype=torch.float32)
%a : bf16[128,128] = @a.weight
%a_q : bf16[128,128] = fxq.quantize(%a, %a_amax, format='fp8_blocks', scale='max')
%a_which : i64[] = fxq.value('a_which', dtype=torch.int64)
%x_q_choice : bf16[4,128] = fxq.choose([%x_q], %a_which)
%a_choice : bf16[128,128] = fxq.choose([%a_q], %a_which)
%y : bf16[4,128] = aten.linear(%x_q_choice, %a_choice)
%y_amax : f32[] = fxq.amax(%y)
%y_q : bf16[4,128] = fxq.quantize(%y, %y_amax, format='nvfp4', scale='dynamic')
%b : bf16[128,128] = @b.weight
%b_amax : f32[] = fxq.amax(%b)
%b_q : bf16[128,128] = fxq.quantize(%b, %b_amax, format='nvfp4', scale='max')
%y_fp8_q : bf16[4,128] = fxq.quantize(%y, %y_amax, format='fp8', scale='static')
%b_which : i64[] = fxq.value('b_which', dtype=torch.int64)
%y_q_choice : bf16[4,128] = fxq.choose([%y_q, %y_fp8_q, %y], %b_which)
%b_fp8_q : bf16[128,128] = fxq.quantize(%b, %b_amax, format='fp8', scale='max')
%b_choice : bf16[128,128] = fxq.choose([%b_q, %b_fp8_q, %b], %b_which)
%z : bf16[4,128] = aten.linear(%y_q_choice, %b_choice)
return [%z]
