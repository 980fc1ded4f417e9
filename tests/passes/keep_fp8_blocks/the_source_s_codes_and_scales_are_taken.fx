pass: keep-fp8-blocks
rewrites: 1
hub:
  encodings: {a.weight: FP8_BLOCKS, c.weight: FP8_BLOCKS}
--- before
%x : bf16[4,128] = placeholder()
%a_weight_input_amax : f32[] = aten.scalar_tensor(1.0, dtype=torch.float32)
%a_weight_input_q : bf16[4,128] = fxq.quantize(%x, %a_weight_input_amax, format='fp8_blocks', scale='dynamic')
%a_weight : bf16[200,128] = @a.weight
%a_weight_amax : f32[] = aten.scalar_tensor(1.0, dtype=torch.float32)
%a_weight_q : bf16[200,128] = fxq.quantize(%a_weight, %a_weight_amax, format='fp8_blocks', scale='max')
%a : bf16[4,200] = aten.linear(%a_weight_input_q, %a_weight_q)
%b_weight : bf16[64,128] = @b.weight
%b_weight_amax : f32[] = aten.scalar_tensor(1.0, dtype=torch.float32)
%b_weight_q : bf16[64,128] = fxq.quantize(%b_weight, %b_weight_amax, format='fp8_blocks', scale='max')
%b : bf16[4,64] = aten.linear(%a_weight_input_q, %b_weight_q)
%c_weight : bf16[16,64] = @c.weight
%c_weight_amax : f32[] = fxq.amax(%c_weight)
%c_weight_q : bf16[16,64] = fxq.quantize(%c_weight, %c_weight_amax, format='nvfp4', scale='max')
%c : bf16[4,16] = aten.linear(%b, %c_weight_q)
return [%a, %c]
--- after
%x : bf16[4,128] = placeholder()
%a_weight_input_amax : f32[] = aten.scalar_tensor(1.0, dtype=torch.float32)
%a_weight_input_q : bf16[4,128] = fxq.quantize(%x, %a_weight_input_amax, format='fp8_blocks', scale='dynamic')
%a_weight_amax : f32[] = aten.scalar_tensor(1.0, dtype=torch.float32)
%a_weight : bf16[200,128] = @a.weight
%a_weight_codes : f8e4m3[200,128] = @a.weight.codes
%a_weight_scales : f32[2,1] = @a.weight.scales
%a_weight_q : bf16[200,128] = fxq.rounded(%a_weight, %a_weight_amax, %a_weight_codes, %a_weight_scales, format='fp8_blocks')
%a : bf16[4,200] = aten.linear(%a_weight_input_q, %a_weight_q)
%b_weight_amax : f32[] = aten.scalar_tensor(1.0, dtype=torch.float32)
%b_weight : bf16[64,128] = @b.weight
%b_weight_q : bf16[64,128] = fxq.quantize(%b_weight, %b_weight_amax, format='fp8_blocks', scale='max')
%b : bf16[4,64] = aten.linear(%a_weight_input_q, %b_weight_q)
%c_weight : bf16[16,64] = @c.weight
%c_weight_amax : f32[] = fxq.amax(%c_weight)
%c_weight_q : bf16[16,64] = fxq.quantize(%c_weight, %c_weight_amax, format='nvfp4', scale='max')
%c : bf16[4,16] = aten.linear(%b, %c_weight_q)
return [%a, %c]
--- miss
b_weight_q: the source holds it in plain numbers, not in FP8_BLOCKS
c_weight_q: it is to be nvfp4
