pass: quantize-linears
options: {only: ["*.mlp.*"]}
--- before
%x : bf16[4,32] = placeholder()
%a : bf16[32,32] = @layers.0.o_proj.weight
%b : bf16[4,32] = aten.linear(%x, %a)
%last : bf16[8,32] = @lm_head.weight
%logits : bf16[4,8] = aten.linear(%b, %last)
return [%logits]
--- error
SpecError: quantize-linears: no linear fits only=['*.mlp.*']
layers.0.o_proj
