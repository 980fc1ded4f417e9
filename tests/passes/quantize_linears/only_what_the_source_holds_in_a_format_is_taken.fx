pass: quantize-linears
options: {stored: [MXFP4], inputs: none}
rewrites: 1
hub:
  encodings: {a.weight: MXFP4, b.weight: FP8}
--- before
%x : bf16[4,32] = placeholder()
%a_weight : bf16[32,32] = @a.weight
%a : bf16[4,32] = aten.linear(%x, %a_weight)
%b_weight : bf16[32,32] = @b.weight
%b : bf16[4,32] = aten.linear(%a, %b_weight)
%c_weight : bf16[32,32] = @c.weight
%c : bf16[4,32] = aten.linear(%b, %c_weight)
%d_weight : bf16[16,32] = @d.weight
%z : bf16[4,16] = aten.linear(%c, %d_weight)
return [%z]
--- after
%x : bf16[4,32] = placeholder()
%a_weight : bf16[32,32] = @a.weight
%a_weight_amax : f32[] = fxq.amax(%a_weight)
%a_weight_q : bf16[32,32] = fxq.quantize(%a_weight, %a_weight_amax, format='nvfp4', scale='max')
%a : bf16[4,32] = aten.linear(%x, %a_weight_q)
%b_weight : bf16[32,32] = @b.weight
%b : bf16[4,32] = aten.linear(%a, %b_weight)
%c_weight : bf16[32,32] = @c.weight
%c : bf16[4,32] = aten.linear(%b, %c_weight)
%d_weight : bf16[16,32] = @d.weight
%z : bf16[4,16] = aten.linear(%c, %d_weight)
return [%z]
--- miss
b: the source holds it in FP8, not in MXFP4
c: the source holds it in plain numbers, not in MXFP4
z: the output head
