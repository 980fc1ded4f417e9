pass: quantize-linears
options: {head: true, inputs: none}
rewrites: 2
--- before
%x : bf16[4,32] = placeholder()
%a_weight : bf16[32,32] = @a.weight
%a : bf16[4,32] = aten.linear(%x, %a_weight)
%head_weight : bf16[16,32] = @lm_head.weight
%y : bf16[4,16] = aten.linear(%a, %head_weight)
return [%y]
--- after
%x : bf16[4,32] = placeholder()
%a_weight : bf16[32,32] = @a.weight
%a_weight_amax : f32[] = fxq.amax(%a_weight)
%a_weight_q : bf16[32,32] = fxq.quantize(%a_weight, %a_weight_amax, format='nvfp4', scale='max')
%a : bf16[4,32] = aten.linear(%x, %a_weight_q)
%head_weight : bf16[16,32] = @lm_head.weight
%head_weight_amax : f32[] = fxq.amax(%head_weight)
%head_weight_q : bf16[16,32] = fxq.quantize(%head_weight, %head_weight_amax, format='nvfp4', scale='max')
%y : bf16[4,16] = aten.linear(%a, %head_weight_q)
return [%y]
