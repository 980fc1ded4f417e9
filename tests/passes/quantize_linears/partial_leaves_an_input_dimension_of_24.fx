pass: quantize-linears
options: {partial: true, inputs: none}
rewrites: 1
--- before
%x : bf16[4,24] = placeholder()
%up : bf16[32,24] = @mlp.up_proj.weight
%h : bf16[4,32] = aten.linear(%x, %up)
%act : bf16[4,32] = aten.relu(%h)
%down : bf16[24,32] = @mlp.down_proj.weight
%y : bf16[4,24] = aten.linear(%act, %down)
%lm : bf16[8,24] = @lm_head.weight
%logits : bf16[4,8] = aten.linear(%y, %lm)
return [%logits]
--- after
%x : bf16[4,24] = placeholder()
%up : bf16[32,24] = @mlp.up_proj.weight
%h : bf16[4,32] = aten.linear(%x, %up)
%act : bf16[4,32] = aten.relu(%h)
%down : bf16[24,32] = @mlp.down_proj.weight
%down_amax : f32[] = fxq.amax(%down)
%down_q : bf16[24,32] = fxq.quantize(%down, %down_amax, format='nvfp4', scale='max')
%y : bf16[4,24] = aten.linear(%act, %down_q)
%lm : bf16[8,24] = @lm_head.weight
%logits : bf16[4,8] = aten.linear(%y, %lm)
return [%logits]
