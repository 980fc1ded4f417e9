pass: lower
--- before
%x : bf16[4,32] = placeholder()
%gate : bf16[16,32] = @mlp.gate_proj.weight
%gate_amax : f32[] = fxq.amax(%gate)
%gate_q : bf16[16,32] = fxq.quantize(%gate, %gate_amax, format='nvfp4', scale='max')
%g : bf16[4,16] = aten.linear(%x, %gate_q)
%act : bf16[4,16] = aten.silu(%g)
%up : bf16[16,32] = @mlp.up_proj.weight
%up_amax : f32[] = fxq.amax(%up)
%up_q : bf16[16,32] = fxq.quantize(%up, %up_amax, format='nvfp4', scale='max')
%u : bf16[4,16] = aten.linear(%x, %up_q)
%h : bf16[4,16] = aten.mul.Tensor(%act, %u)
%last : bf16[8,16] = @lm_head.weight
%logits : bf16[4,8] = aten.linear(%h, %last)
return [%logits]
--- error
VerifyError: lower requires amaxes_shared
