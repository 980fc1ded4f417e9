pass: calibrate-max
batches: [[[0, 1, 0, 1]]]
--- before
%ids : i64[1,4] = placeholder()
%table : bf16[4,16] = @embed.weight
%x : bf16[1,4,16] = aten.embedding(%table, %ids)
%far : bf16[1,4,16] = aten.div.Scalar(%x, 0)
%a_input_amax : f32[] = fxq.amax(%far)
%a_input_q : bf16[1,4,16] = fxq.quantize(%far, %a_input_amax, format='nvfp4', scale='dynamic')
%a : bf16[16,16] = @a.weight
%a_amax : f32[] = fxq.amax(%a)
%a_q : bf16[16,16] = fxq.quantize(%a, %a_amax, format='nvfp4', scale='max')
%y : bf16[1,4,16] = aten.linear(%a_input_q, %a_q)
%last : bf16[8,16] = @lm_head.weight
%logits : bf16[1,4,8] = aten.linear(%y, %last)
return [%logits]
--- error
SourceError: %a_input_amax: calibration produced Inf in an activation
