pass: quantize-linears
rewrites: 1
--- before
%x : bf16[4,32] = placeholder()
%gate : bf16[1,32] = @mlp.shared_expert_gate.weight
%g : bf16[4,1] = aten.linear(%x, %gate)
%sigmoid : bf16[4,1] = aten.sigmoid(%g)
%up : bf16[16,32] = @mlp.shared_expert.up_proj.weight
%u : bf16[4,16] = aten.linear(%x, %up)
%y : bf16[4,16] = aten.mul.Tensor(%sigmoid, %u)
%last : bf16[8,16] = @lm_head.weight
%logits : bf16[4,8] = aten.linear(%y, %last)
return [%logits]
--- after
%x : bf16[4,32] = placeholder()
%gate : bf16[1,32] = @mlp.shared_expert_gate.weight
%g : bf16[4,1] = aten.linear(%x, %gate)
%sigmoid : bf16[4,1] = aten.sigmoid(%g)
%up_input_amax : f32[] = fxq.amax(%x)
%up_input_q : bf16[4,32] = fxq.quantize(%x, %up_input_amax, format='nvfp4', scale='dynamic')
%up : bf16[16,32] = @mlp.shared_expert.up_proj.weight
%up_amax : f32[] = fxq.amax(%up)
%up_q : bf16[16,32] = fxq.quantize(%up, %up_amax, format='nvfp4', scale='max')
%u : bf16[4,16] = aten.linear(%up_input_q, %up_q)
%y : bf16[4,16] = aten.mul.Tensor(%sigmoid, %u)
%last : bf16[8,16] = @lm_head.weight
%logits : bf16[4,8] = aten.linear(%y, %last)
return [%logits]
--- miss
g: a gate: it has a single output
