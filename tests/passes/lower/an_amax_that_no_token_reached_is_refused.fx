pass: lower
values: {a_input_amax: 1.0, b_input_amax: -1.0}
--- before
%ids : i64[1,4] = placeholder()
%table : bf16[4,16] = @embed.weight
%x : bf16[1,4,16] = aten.embedding(%table, %ids)
%a_input_amax : f32[] = fxq.amax(%x)
%a_input_q : bf16[1,4,16] = fxq.quantize(%x, %a_input_amax, format='nvfp4', scale='dynamic')
%a : bf16[16,16] = @a.weight
%a_amax : f32[] = fxq.amax(%a)
%a_q : bf16[16,16] = fxq.quantize(%a, %a_amax, format='nvfp4', scale='max')
%y : bf16[1,4,16] = aten.linear(%a_input_q, %a_q)
%b_input_amax : f32[] = fxq.amax(%y)
%b_input_q : bf16[1,4,16] = fxq.quantize(%y, %b_input_amax, format='nvfp4', scale='dynamic')
%b : bf16[16,16] = @b.weight
%b_amax : f32[] = fxq.amax(%b)
%b_q : bf16[16,16] = fxq.quantize(%b, %b_amax, format='nvfp4', scale='max')
%z : bf16[1,4,16] = aten.linear(%b_input_q, %b_q)
%last : bf16[8,16] = @lm_head.weight
%logits : bf16[1,4,8] = aten.linear(%z, %last)
return [%logits]
--- error
VerifyError: lower requires amaxes_filled: %b_input_amax has no value: no token reached it
