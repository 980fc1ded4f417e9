pass: quantize-linears
options: {weights: fp8_blocks, inputs: fp8_blocks}
rewrites: 2
--- before
%x : bf16[4,128] = placeholder()
%a_weight : bf16[128,128] = @a.weight
%a : bf16[4,128] = aten.linear(%x, %a_weight)
%b_weight : bf16[128,128] = @b.weight
%b : bf16[4,128] = aten.linear(%a, %b_weight)
%head_weight : bf16[16,128] = @head.weight
%y : bf16[4,16] = aten.linear(%b, %head_weight)
return [%y]
--- after
%x : bf16[4,128] = placeholder()
%a_weight_input_amax : f32[] = aten.scalar_tensor(1.0, dtype=torch.float32)
%a_weight_input_q : bf16[4,128] = fxq.quantize(%x, %a_weight_input_amax, format='fp8_blocks', scale='dynamic')
%a_weight_amax : f32[] = aten.scalar_tensor(1.0, dtype=torch.float32)
%a_weight : bf16[128,128] = @a.weight
%a_weight_q : bf16[128,128] = fxq.quantize(%a_weight, %a_weight_amax, format='fp8_blocks', scale='max')
%a : bf16[4,128] = aten.linear(%a_weight_input_q, %a_weight_q)
%b_weight_input_amax : f32[] = aten.scalar_tensor(1.0, dtype=torch.float32)
%b_weight_input_q : bf16[4,128] = fxq.quantize(%a, %b_weight_input_amax, format='fp8_blocks', scale='dynamic')
%b_weight_amax : f32[] = aten.scalar_tensor(1.0, dtype=torch.float32)
%b_weight : bf16[128,128] = @b.weight
%b_weight_q : bf16[128,128] = fxq.quantize(%b_weight, %b_weight_amax, format='fp8_blocks', scale='max')
%b : bf16[4,128] = aten.linear(%b_weight_input_q, %b_weight_q)
%head_weight : bf16[16,128] = @head.weight
%y : bf16[4,16] = aten.linear(%b, %head_weight)
return [%y]
