pass: quantize-linears
options: {inputs: none, skip_first: 1, skip_last: 1}
--- before
%x : bf16[4,32] = placeholder()
%a : bf16[32,32] = @layers.0.o_proj.weight
%b : bf16[4,32] = aten.linear(%x, %a)
%c : bf16[32,32] = @layers.1.o_proj.weight
%d : bf16[4,32] = aten.linear(%b, %c)
%e : bf16[32,32] = @layers.10.o_proj.weight
%f : bf16[4,32] = aten.linear(%d, %e)
%last : bf16[8,32] = @lm_head.weight
%logits : bf16[4,8] = aten.linear(%f, %last)
return [%logits]
--- after
%x : bf16[4,32] = placeholder()
%a : bf16[32,32] = @layers.0.o_proj.weight
%b : bf16[4,32] = aten.linear(%x, %a)
%c : bf16[32,32] = @layers.1.o_proj.weight
%c_amax : f32[] = fxq.amax(%c)
%c_q : bf16[32,32] = fxq.quantize(%c, %c_amax, format='nvfp4', scale='max')
%d : bf16[4,32] = aten.linear(%b, %c_q)
%e : bf16[32,32] = @layers.10.o_proj.weight
%f : bf16[4,32] = aten.linear(%d, %e)
%last : bf16[8,32] = @lm_head.weight
%logits : bf16[4,8] = aten.linear(%f, %last)
return [%logits]
--- miss
b: in the first 1 of 3 layers
f: in the last 1 of 3 layers
