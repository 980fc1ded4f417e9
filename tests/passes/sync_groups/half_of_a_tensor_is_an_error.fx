pass: sync-groups
hub:
  tensors: {ab.weight: "bf16[64,32]"}
  stored:
    a.weight: {keys: [[ab.weight]], rows: [[0, 32]]}
    b.weight: {keys: [[ab.weight]], rows: [[32, 64]]}
--- before
%x : bf16[4,32] = placeholder()
%a_input_amax : f32[] = fxq.amax(%x)
%a_input_q : bf16[4,32] = fxq.quantize(%x, %a_input_amax, format='nvfp4', scale='dynamic')
%a : bf16[32,32] = @a.weight
%a_amax : f32[] = fxq.amax(%a)
%a_q : bf16[32,32] = fxq.quantize(%a, %a_amax, format='nvfp4', scale='max')
%y : bf16[4,32] = aten.linear(%a_input_q, %a_q)
%x2 : bf16[4,32] = aten.relu(%x)
%b_input_amax : f32[] = fxq.amax(%x2)
%b_input_q : bf16[4,32] = fxq.quantize(%x2, %b_input_amax, format='nvfp4', scale='dynamic')
%b : bf16[32,32] = @b.weight
%z : bf16[4,32] = aten.linear(%b_input_q, %b)
return [%y, %z]
--- error
VerifyError: sync-groups ensures tensors_whole
ab.weight holds both a.weight, which is quantized, and b.weight, which is not
