pass: calibrate-max
rewrites: 1
weights: {embed.weight: [1.0, -2.0, 3.0, -4.0], a.weight: 0.5, lm_head.weight: 1.0}
batches: [[[0, 1, 0, 1]], [[2, 1, 0, 0]]]
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
%last : bf16[8,16] = @lm_head.weight
%logits : bf16[1,4,8] = aten.linear(%y, %last)
return [%logits]
--- after
%ids : i64[1,4] = placeholder()
%table : bf16[4,16] = @embed.weight
%x : bf16[1,4,16] = aten.embedding(%table, %ids)
%a_input_amax : f32[] = fxq.amax(%x)  # = 3
%a_input_q : bf16[1,4,16] = fxq.quantize(%x, %a_input_amax, format='nvfp4', scale='dynamic')
%a : bf16[16,16] = @a.weight
%a_amax : f32[] = fxq.amax(%a)
%a_q : bf16[16,16] = fxq.quantize(%a, %a_amax, format='nvfp4', scale='max')
%y : bf16[1,4,16] = aten.linear(%a_input_q, %a_q)
%last : bf16[8,16] = @lm_head.weight
%logits : bf16[1,4,8] = aten.linear(%y, %last)
return [%logits]
