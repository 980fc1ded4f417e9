pass: sync-groups
rewrites: 2
--- before
%x : bf16[2,2,32] = placeholder()
%flat : bf16[4,32] = aten.view(%x, [4, 32])
%a_input_amax : f32[] = fxq.amax(%flat)
%a_input_q : bf16[4,32] = fxq.quantize(%flat, %a_input_amax, format='nvfp4', scale='dynamic')
%a : bf16[16,32] = @a.weight
%a_amax : f32[] = fxq.amax(%a)
%a_q : bf16[16,32] = fxq.quantize(%a, %a_amax, format='nvfp4', scale='max')
%a_out : bf16[4,16] = aten.linear(%a_input_q, %a_q)
%wide : f32[2,2,32] = aten._to_copy(%x, dtype=torch.float32)
%narrow : bf16[2,2,32] = aten._to_copy(%wide, dtype=torch.bfloat16)
%b_input_amax : f32[] = fxq.amax(%narrow)
%b_input_q : bf16[2,2,32] = fxq.quantize(%narrow, %b_input_amax, format='nvfp4', scale='dynamic')
%b : bf16[16,32] = @b.weight
%b_amax : f32[] = fxq.amax(%b)
%b_q : bf16[16,32] = fxq.quantize(%b, %b_amax, format='nvfp4', scale='max')
%b_out : bf16[2,2,16] = aten.linear(%b_input_q, %b_q)
%end : bf16[1,16] = @end.weight
%one : bf16[4,1] = aten.linear(%a_out, %end)
return [%one, %b_out]
--- after
%x : bf16[2,2,32] = placeholder()
%flat : bf16[4,32] = aten.view(%x, [4, 32])
%a_input_amax : f32[] = fxq.amax(%flat)
%wide : f32[2,2,32] = aten._to_copy(%x, dtype=torch.float32)
%narrow : bf16[2,2,32] = aten._to_copy(%wide, dtype=torch.bfloat16)
%b_input_amax : f32[] = fxq.amax(%narrow)
%a_group_input_amax : f32[] = fxq.sync([%a_input_amax, %b_input_amax])
%a_input_q : bf16[4,32] = fxq.quantize(%flat, %a_group_input_amax, format='nvfp4', scale='dynamic')
%a : bf16[16,32] = @a.weight
%a_amax : f32[] = fxq.amax(%a)
%b : bf16[16,32] = @b.weight
%b_amax : f32[] = fxq.amax(%b)
%a_group_amax : f32[] = fxq.sync([%a_amax, %b_amax])
%a_q : bf16[16,32] = fxq.quantize(%a, %a_group_amax, format='nvfp4', scale='max')
%a_out : bf16[4,16] = aten.linear(%a_input_q, %a_q)
%b_input_q : bf16[2,2,32] = fxq.quantize(%narrow, %a_group_input_amax, format='nvfp4', scale='dynamic')
%b_q : bf16[16,32] = fxq.quantize(%b, %a_group_amax, format='nvfp4', scale='max')
%b_out : bf16[2,2,16] = aten.linear(%b_input_q, %b_q)
%end : bf16[1,16] = @end.weight
%one : bf16[4,1] = aten.linear(%a_out, %end)
return [%one, %b_out]
