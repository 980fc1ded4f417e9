pass: quantize-linears
--- before
%x : bf16[4,24] = placeholder()
%a : bf16[32,24] = @layers.0.o_proj.weight
%b : bf16[4,32] = aten.linear(%x, %a)
%last : bf16[8,32] = @lm_head.weight
%logits : bf16[4,8] = aten.linear(%b, %last)
return [%logits]
--- error
VerifyError: layers.0.o_proj.weight: its input dimension is 24
multiple of 16
skip: ['layers.0.o_proj']
