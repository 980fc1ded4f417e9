pass: fix-input-scales
options: {scale: 0.5}
rewrites: 3
--- before
%x : bf16[4,32] = placeholder()
%a_weight_input_amax : f32[] = fxq.amax(%x)
%twice : bf16[4,32] = aten.mul.Tensor(%x, 2.0)
%b_weight_input_amax : f32[] = fxq.amax(%twice)
%group_amax : f32[] = fxq.sync([%a_weight_input_amax, %b_weight_input_amax])
%a_weight_input_q : bf16[4,32] = fxq.quantize(%x, %group_amax, format='nvfp4', scale='dynamic')
%a_weight : bf16[32,32] = @a.weight
%a_weight_amax : f32[] = fxq.amax(%a_weight)
%a_weight_q : bf16[32,32] = fxq.quantize(%a_weight, %a_weight_amax, format='nvfp4', scale='max')
%a : bf16[4,32] = aten.linear(%a_weight_input_q, %a_weight_q)
%b_weight_input_q : bf16[4,32] = fxq.quantize(%twice, %group_amax, format='nvfp4', scale='dynamic')
%b_weight : bf16[32,32] = @b.weight
%b : bf16[4,32] = aten.linear(%b_weight_input_q, %b_weight)
%c_weight_input_amax : f32[] = fxq.amax(%a)
%c_weight_input_q : bf16[4,32] = fxq.quantize(%a, %c_weight_input_amax, format='fp8', scale='static')
%c_weight : bf16[32,32] = @c.weight
%c : bf16[4,32] = aten.linear(%c_weight_input_q, %c_weight)
return [%b, %c]
--- after
%x : bf16[4,32] = placeholder()
%twice : bf16[4,32] = aten.mul.Tensor(%x, 2.0)
%group_amax_fixed : f32[] = aten.scalar_tensor(1344.0, dtype=torch.float32)
%a_weight_input_q : bf16[4,32] = fxq.quantize(%x, %group_amax_fixed, format='nvfp4', scale='dynamic')
%a_weight : bf16[32,32] = @a.weight
%a_weight_amax : f32[] = fxq.amax(%a_weight)
%a_weight_q : bf16[32,32] = fxq.quantize(%a_weight, %a_weight_amax, format='nvfp4', scale='max')
%a : bf16[4,32] = aten.linear(%a_weight_input_q, %a_weight_q)
%b_weight_input_q : bf16[4,32] = fxq.quantize(%twice, %group_amax_fixed, format='nvfp4', scale='dynamic')
%b_weight : bf16[32,32] = @b.weight
%b : bf16[4,32] = aten.linear(%b_weight_input_q, %b_weight)
%c_weight_input_amax_fixed : f32[] = aten.scalar_tensor(224.0, dtype=torch.float32)
%c_weight_input_q : bf16[4,32] = fxq.quantize(%a, %c_weight_input_amax_fixed, format='fp8', scale='static')
%c_weight : bf16[32,32] = @c.weight
%c : bf16[4,32] = aten.linear(%c_weight_input_q, %c_weight)
return [%b, %c]
