pass: lower
--- before
%ids : i64[1,4] = placeholder()
%table : bf16[8,16] = @embed.weight
%x : bf16[1,4,16] = aten.embedding(%table, %ids)
%a : bf16[16,16] = @a.weight
%y : bf16[1,4,16] = aten.linear(%x, %a)
%table_amax : f32[] = fxq.amax(%table)
%table_q : bf16[8,16] = fxq.quantize(%table, %table_amax, format='nvfp4', scale='max')
%logits : bf16[1,4,8] = aten.linear(%y, %table_q)
return [%logits]
--- error
VerifyError: embed.weight
