pass: choose-formats
--- before
%x : bf16[4,32] = placeholder()
%a : bf16[64,32] = @a.weight
%a_amax : f32[] = fxq.amax(%a)
%b : bf16[32,32] = @b.weight
%b_amax : f32[] = fxq.amax(%b)
%a_group_amax : f32[] = fxq.sync([%a_amax, %b_amax])
%a_q : bf16[64,32] = fxq.quantize(%a, %a_group_amax, format='nvfp4', scale='mse')
%y : bf16[4,64] = aten.linear(%x, %a_q)
%b_q : bf16[32,32] = fxq.quantize(%b, %a_group_amax, format='nvfp4', scale='mse')
%z : bf16[4,32] = aten.linear(%x, %b_q)
return [%y, %z]
--- error
SpecError: choose-formats: the inputs of a.weight, b.weight are not rounded
nvfp4 weight-only
