pass: quantize-linears
options: {only: ["lm_head"]}
rewrites: 1
--- before
%x : bf16[4,32] = placeholder()
%last : bf16[8,32] = @lm_head.weight
%logits : bf16[4,8] = aten.linear(%x, %last)
return [%logits]
--- after
%x : bf16[4,32] = placeholder()
%last_input_amax : f32[] = fxq.amax(%x)
%last_input_q : bf16[4,32] = fxq.quantize(%x, %last_input_amax, format='nvfp4', scale='dynamic')
%last : bf16[8,32] = @lm_head.weight
%last_amax : f32[] = fxq.amax(%last)
%last_q : bf16[8,32] = fxq.quantize(%last, %last_amax, format='nvfp4', scale='max')
%logits : bf16[4,8] = aten.linear(%last_input_q, %last_q)
return [%logits]
