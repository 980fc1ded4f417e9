pass: sync-groups
rewrites: 2
hub:
  tensors: {experts.w1: "bf16[2,16,32]", experts.v1: "bf16[2,16,32]"}
  stored:
    experts.w1: {keys: [[experts.w1]]}
    experts.v1: {keys: [[experts.v1]]}
--- before
%x : bf16[4,32] = placeholder()
%ids : i64[4] = placeholder()
%gate_input_amax : f32[] = fxq.amax(%x)
%gate_input_q : bf16[4,32] = fxq.quantize(%x, %gate_input_amax, format='nvfp4', scale='dynamic')
%gate : bf16[2,16,32] = @experts.w1
%gate_e0 : bf16[16,32] = fxq.slice(%gate, 0)
%gate_e0_amax : f32[] = fxq.amax(%gate_e0)
%gate_e0_q : bf16[16,32] = fxq.quantize(%gate_e0, %gate_e0_amax, format='nvfp4', scale='max')
%gate_e1 : bf16[16,32] = fxq.slice(%gate, 1)
%gate_e1_amax : f32[] = fxq.amax(%gate_e1)
%gate_e1_q : bf16[16,32] = fxq.quantize(%gate_e1, %gate_e1_amax, format='nvfp4', scale='max')
%gate_q : bf16[2,16,32] = fxq.stack([%gate_e0_q, %gate_e1_q])
%g : bf16[4,16] = fxq.expert_linear(%gate_input_q, %gate_q, %ids)
%act : bf16[4,16] = aten.silu(%g)
%up_input_amax : f32[] = fxq.amax(%x)
%up_input_q : bf16[4,32] = fxq.quantize(%x, %up_input_amax, format='nvfp4', scale='dynamic')
%up : bf16[2,16,32] = @experts.v1
%up_e0 : bf16[16,32] = fxq.slice(%up, 0)
%up_e0_amax : f32[] = fxq.amax(%up_e0)
%up_e0_q : bf16[16,32] = fxq.quantize(%up_e0, %up_e0_amax, format='nvfp4', scale='max')
%up_e1 : bf16[16,32] = fxq.slice(%up, 1)
%up_e1_amax : f32[] = fxq.amax(%up_e1)
%up_e1_q : bf16[16,32] = fxq.quantize(%up_e1, %up_e1_amax, format='nvfp4', scale='max')
%up_q : bf16[2,16,32] = fxq.stack([%up_e0_q, %up_e1_q])
%u : bf16[4,16] = fxq.expert_linear(%up_input_q, %up_q, %ids)
%h : bf16[4,16] = aten.mul.Tensor(%act, %u)
return [%h]
--- after
%x : bf16[4,32] = placeholder()
%ids : i64[4] = placeholder()
%gate_input_amax : f32[] = fxq.amax(%x)
%up_input_amax : f32[] = fxq.amax(%x)
%gate_e0_group_input_amax : f32[] = fxq.sync([%gate_input_amax, %up_input_amax])
%gate_input_q : bf16[4,32] = fxq.quantize(%x, %gate_e0_group_input_amax, format='nvfp4', scale='dynamic')
%gate : bf16[2,16,32] = @experts.w1
%gate_e0 : bf16[16,32] = fxq.slice(%gate, 0)
%gate_e0_amax : f32[] = fxq.amax(%gate_e0)
%up : bf16[2,16,32] = @experts.v1
%up_e0 : bf16[16,32] = fxq.slice(%up, 0)
%up_e0_amax : f32[] = fxq.amax(%up_e0)
%gate_e1 : bf16[16,32] = fxq.slice(%gate, 1)
%gate_e1_amax : f32[] = fxq.amax(%gate_e1)
%up_e1 : bf16[16,32] = fxq.slice(%up, 1)
%up_e1_amax : f32[] = fxq.amax(%up_e1)
%gate_e0_group_amax : f32[] = fxq.sync([%gate_e0_amax, %up_e0_amax, %gate_e1_amax, %up_e1_amax])
%gate_e0_q : bf16[16,32] = fxq.quantize(%gate_e0, %gate_e0_group_amax, format='nvfp4', scale='max')
%gate_e1_q : bf16[16,32] = fxq.quantize(%gate_e1, %gate_e0_group_amax, format='nvfp4', scale='max')
%gate_q : bf16[2,16,32] = fxq.stack([%gate_e0_q, %gate_e1_q])
%g : bf16[4,16] = fxq.expert_linear(%gate_input_q, %gate_q, %ids)
%act : bf16[4,16] = aten.silu(%g)
%up_input_q : bf16[4,32] = fxq.quantize(%x, %gate_e0_group_input_amax, format='nvfp4', scale='dynamic')
%up_e0_q : bf16[16,32] = fxq.quantize(%up_e0, %gate_e0_group_amax, format='nvfp4', scale='max')
%up_e1_q : bf16[16,32] = fxq.quantize(%up_e1, %gate_e0_group_amax, format='nvfp4', scale='max')
%up_q : bf16[2,16,32] = fxq.stack([%up_e0_q, %up_e1_q])
%u : bf16[4,16] = fxq.expert_linear(%up_input_q, %up_q, %ids)
%h : bf16[4,16] = aten.mul.Tensor(%act, %u)
return [%h]
