pass: lower
--- before
%ids : i64[1,4] = placeholder()
%table : bf16[4,16] = @embed.weight
%x : bf16[1,4,16] = aten.embedding(%table, %ids)
%a : bf16[16,16] = @a.weight
%y : bf16[1,4,16] = aten.linear(%x, %a)
%last : bf16[8,16] = @lm_head.weight
%logits : bf16[1,4,8] = aten.linear(%y, %last)
return [%logits]
--- error
VerifyError: lower: no weight is quantized
