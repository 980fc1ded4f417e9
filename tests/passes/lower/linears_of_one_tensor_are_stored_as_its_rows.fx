pass: lower
rewrites: 2
hub:
  tensors: {mlp.gate_up_proj.weight: "bf16[32,32]"}
  stored:
    mlp.gate_proj.weight: {keys: [[mlp.gate_up_proj.weight]], rows: [[0, 16]]}
    mlp.up_proj.weight: {keys: [[mlp.gate_up_proj.weight]], rows: [[16, 32]]}
--- before
%x : bf16[4,32] = placeholder()
%gate : bf16[16,32] = @mlp.gate_proj.weight
%gate_amax : f32[] = fxq.amax(%gate)
%up : bf16[16,32] = @mlp.up_proj.weight
%up_amax : f32[] = fxq.amax(%up)
%gate_group_amax : f32[] = fxq.sync([%gate_amax, %up_amax])
%gate_q : bf16[16,32] = fxq.quantize(%gate, %gate_group_amax, format='nvfp4', scale='max')
%g : bf16[4,16] = aten.linear(%x, %gate_q)
%act : bf16[4,16] = aten.silu(%g)
%up_q : bf16[16,32] = fxq.quantize(%up, %gate_group_amax, format='nvfp4', scale='max')
%u : bf16[4,16] = aten.linear(%x, %up_q)
%h : bf16[4,16] = aten.mul.Tensor(%act, %u)
return [%h]
--- after
%gate : bf16[16,32] = @mlp.gate_proj.weight
%gate_amax : f32[] = fxq.amax(%gate)
%up : bf16[16,32] = @mlp.up_proj.weight
%up_amax : f32[] = fxq.amax(%up)
%gate_group_amax : f32[] = fxq.sync([%gate_amax, %up_amax])
%gate_packed : [u8[16,16], f8e4m3[16,2], f32[]] = fxq.pack(%gate, %gate_group_amax, format='nvfp4', scale='max')
%gate_packed_0 : none = fxq.store_rows('mlp.gate_up_proj.weight', %gate_packed, None, start=0, end=16, rows=[0, 16, 1], shape=[32, 32], expert=0, experts=1, transposed=False)
%up_packed : [u8[16,16], f8e4m3[16,2], f32[]] = fxq.pack(%up, %gate_group_amax, format='nvfp4', scale='max')
%up_packed_0 : none = fxq.store_rows('mlp.gate_up_proj.weight', %up_packed, None, start=0, end=16, rows=[16, 32, 1], shape=[32, 32], expert=0, experts=1, transposed=False)
return ()
