pass: quantize-linears
options: {skip: ["layers.0.o_prj"]}
--- before
%x : bf16[4,32] = placeholder()
%a : bf16[32,32] = @layers.0.o_proj.weight
%b : bf16[4,32] = aten.linear(%x, %a)
%last : bf16[8,32] = @lm_head.weight
%logits : bf16[4,8] = aten.linear(%b, %last)
return [%logits]
--- error
SpecError: no linear is called 'layers.0.o_prj'
layers.0.o_proj
