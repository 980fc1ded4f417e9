pass: lower
rewrites: 2
--- before
%x : bf16[4,32] = placeholder()
%gate_input_amax : f32[] = fxq.amax(%x)
%gate_input_q : bf16[4,32] = fxq.quantize(%x, %gate_input_amax, format='nvfp4', scale='dynamic')
%gate : bf16[16,32] = @mlp.gate_proj.weight
%gate_amax : f32[] = fxq.amax(%gate)
%up : bf16[16,32] = @mlp.up_proj.weight
%up_amax : f32[] = fxq.amax(%up)
%gate_group_amax : f32[] = fxq.sync([%gate_amax, %up_amax])
%gate_q : bf16[16,32] = fxq.quantize(%gate, %gate_group_amax, format='nvfp4', scale='max')
%g : bf16[4,16] = aten.linear(%gate_input_q, %gate_q)
%act : bf16[4,16] = aten.silu(%g)
%up_q : bf16[16,32] = fxq.quantize(%up, %gate_group_amax, format='nvfp4', scale='max')
%u : bf16[4,16] = aten.linear(%gate_input_q, %up_q)
%h : bf16[4,16] = aten.mul.Tensor(%act, %u)
%last : bf16[8,16] = @lm_head.weight
%logits : bf16[4,8] = aten.linear(%h, %last)
return [%logits]
--- after
%gate_input_amax : f32[] = fxq.value('gate_input_amax')
%gate : bf16[16,32] = @mlp.gate_proj.weight
%gate_amax : f32[] = fxq.amax(%gate)
%up : bf16[16,32] = @mlp.up_proj.weight
%up_amax : f32[] = fxq.amax(%up)
%gate_group_amax : f32[] = fxq.sync([%gate_amax, %up_amax])
%gate_packed : [u8[16,16], f8e4m3[16,2], f32[]] = fxq.pack(%gate, %gate_group_amax, format='nvfp4', scale='max')
%gate_packed_0 : none = fxq.store_linear('mlp.gate_proj', %gate_packed, %gate_input_amax, start=0, end=16)
%up_packed : [u8[16,16], f8e4m3[16,2], f32[]] = fxq.pack(%up, %gate_group_amax, format='nvfp4', scale='max')
%up_packed_0 : none = fxq.store_linear('mlp.up_proj', %up_packed, %gate_input_amax, start=0, end=16)
%lm_head_weight_ : bf16[8,16] = fxq.load('lm_head.weight', shape=[8, 16], dtype=torch.bfloat16)
%lm_head_weight_store : none = fxq.store('lm_head.weight', %lm_head_weight_)
return ()
