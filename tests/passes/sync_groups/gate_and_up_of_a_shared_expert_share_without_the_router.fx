pass: sync-groups
rewrites: 1
--- before
%x : bf16[4,32] = placeholder()
%router : bf16[3,32] = @mlp.gate.weight
%r : bf16[4,3] = aten.linear(%x, %router)
%top : (bf16[4,1], i64[4,1]) = aten.topk(%r, 1)
%ids : i64[4,1] = operator.getitem(%top, 1)
%gate_input_amax : f32[] = fxq.amax(%x)
%gate_input_q : bf16[4,32] = fxq.quantize(%x, %gate_input_amax, format='nvfp4', scale='dynamic')
%gate : bf16[16,32] = @mlp.shared_expert.gate_proj.weight
%gate_amax : f32[] = fxq.amax(%gate)
%gate_q : bf16[16,32] = fxq.quantize(%gate, %gate_amax, format='nvfp4', scale='max')
%g : bf16[4,16] = aten.linear(%gate_input_q, %gate_q)
%act : bf16[4,16] = aten.silu(%g)
%up : bf16[16,32] = @mlp.shared_expert.up_proj.weight
%up_amax : f32[] = fxq.amax(%up)
%up_q : bf16[16,32] = fxq.quantize(%up, %up_amax, format='nvfp4', scale='max')
%u : bf16[4,16] = aten.linear(%gate_input_q, %up_q)
%h : bf16[4,16] = aten.mul.Tensor(%act, %u)
return [%h, %ids]
--- after
%x : bf16[4,32] = placeholder()
%router : bf16[3,32] = @mlp.gate.weight
%r : bf16[4,3] = aten.linear(%x, %router)
%top : (bf16[4,1], i64[4,1]) = aten.topk(%r, 1)
%ids : i64[4,1] = operator.getitem(%top, 1)
%gate_input_amax : f32[] = fxq.amax(%x)
%gate_input_q : bf16[4,32] = fxq.quantize(%x, %gate_input_amax, format='nvfp4', scale='dynamic')
%gate : bf16[16,32] = @mlp.shared_expert.gate_proj.weight
%gate_amax : f32[] = fxq.amax(%gate)
%up : bf16[16,32] = @mlp.shared_expert.up_proj.weight
%up_amax : f32[] = fxq.amax(%up)
%gate_group_amax : f32[] = fxq.sync([%gate_amax, %up_amax])
%gate_q : bf16[16,32] = fxq.quantize(%gate, %gate_group_amax, format='nvfp4', scale='max')
%g : bf16[4,16] = aten.linear(%gate_input_q, %gate_q)
%act : bf16[4,16] = aten.silu(%g)
%up_q : bf16[16,32] = fxq.quantize(%up, %gate_group_amax, format='nvfp4', scale='max')
%u : bf16[4,16] = aten.linear(%gate_input_q, %up_q)
%h : bf16[4,16] = aten.mul.Tensor(%act, %u)
return [%h, %ids]
