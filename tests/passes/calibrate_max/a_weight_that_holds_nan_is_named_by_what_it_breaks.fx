pass: calibrate-max
weights: {a.weight: .nan}
batches: [[[0, 1, 0, 1]]]
--- before
%ids : i64[1,4] = placeholder()
%table : bf16[4,16] = @embed.weight
%x : bf16[1,4,16] = aten.embedding(%table, %ids)
%a : bf16[16,16] = @a.weight
%y : bf16[1,4,16] = aten.linear(%x, %a)
%b_input_amax : f32[] = fxq.amax(%y)
%b_input_q : bf16[1,4,16] = fxq.quantize(%y, %b_input_amax, format='nvfp4', scale='dynamic')
%b : bf16[16,16] = @b.weight
%b_amax : f32[] = fxq.amax(%b)
%b_q : bf16[16,16] = fxq.quantize(%b, %b_amax, format='nvfp4', scale='max')
%z : bf16[1,4,16] = aten.linear(%b_input_q, %b_q)
return [%z]
--- error
SourceError: a.weight: the weight holds NaN; expected finite values
