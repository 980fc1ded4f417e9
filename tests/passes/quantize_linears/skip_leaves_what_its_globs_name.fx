pass: quantize-linears
options: {inputs: none, skip: ["*attn*"]}
rewrites: 1
--- before
%x : bf16[4,32] = placeholder()
%a : bf16[32,32] = @layers.0.self_attn.o_proj.weight
%b : bf16[4,32] = aten.linear(%x, %a)
%c : bf16[32,32] = @layers.0.mlp.up_proj.weight
%d : bf16[4,32] = aten.linear(%b, %c)
%last : bf16[8,32] = @lm_head.weight
%logits : bf16[4,8] = aten.linear(%d, %last)
return [%logits]
--- after
%x : bf16[4,32] = placeholder()
%a : bf16[32,32] = @layers.0.self_attn.o_proj.weight
%b : bf16[4,32] = aten.linear(%x, %a)
%c : bf16[32,32] = @layers.0.mlp.up_proj.weight
%c_amax : f32[] = fxq.amax(%c)
%c_q : bf16[32,32] = fxq.quantize(%c, %c_amax, format='nvfp4', scale='max')
%d : bf16[4,32] = aten.linear(%b, %c_q)
%last : bf16[8,32] = @lm_head.weight
%logits : bf16[4,8] = aten.linear(%d, %last)
return [%logits]
--- miss
b: not selected by
