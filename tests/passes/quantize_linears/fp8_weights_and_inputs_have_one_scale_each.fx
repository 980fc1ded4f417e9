pass: quantize-linears
options: {weights: fp8, inputs: fp8}
rewrites: 2
--- before
%x : bf16[4,32] = placeholder()
%gate : bf16[16,32] = @gate_proj.weight
%g : bf16[4,16] = aten.linear(%x, %gate)
%act : bf16[4,16] = aten.silu(%g)
%up : bf16[16,32] = @up_proj.weight
%u : bf16[4,16] = aten.linear(%x, %up)
%h : bf16[4,16] = aten.mul.Tensor(%act, %u)
%last : bf16[8,16] = @lm_head.weight
%logits : bf16[4,8] = aten.linear(%h, %last)
return [%logits]
--- after
%x : bf16[4,32] = placeholder()
%gate_input_amax : f32[] = fxq.amax(%x)
%gate_input_q : bf16[4,32] = fxq.quantize(%x, %gate_input_amax, format='fp8', scale='static')
%gate : bf16[16,32] = @gate_proj.weight
%gate_amax : f32[] = fxq.amax(%gate)
%gate_q : bf16[16,32] = fxq.quantize(%gate, %gate_amax, format='fp8', scale='max')
%g : bf16[4,16] = aten.linear(%gate_input_q, %gate_q)
%act : bf16[4,16] = aten.silu(%g)
%up : bf16[16,32] = @up_proj.weight
%up_amax : f32[] = fxq.amax(%up)
%up_q : bf16[16,32] = fxq.quantize(%up, %up_amax, format='fp8', scale='max')
%u : bf16[4,16] = aten.linear(%gate_input_q, %up_q)
%h : bf16[4,16] = aten.mul.Tensor(%act, %u)
%last : bf16[8,16] = @lm_head.weight
%logits : bf16[4,8] = aten.linear(%h, %last)
return [%logits]
