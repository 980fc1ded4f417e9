pass: lower
rewrites: 2
hub:
  tensors: {mlp.experts.gate_up_proj: "bf16[2,32,32]"}
  stored:
    mlp.experts.gate_up_proj: {keys: [[mlp.experts.gate_up_proj]], transposed: true}
--- before
%x : bf16[4,32] = placeholder()
%ids : i64[4] = placeholder()
%w : bf16[2,32,32] = @mlp.experts.gate_up_proj
%w_e0 : bf16[32,32] = fxq.slice(%w, 0)
%w_e0_amax : f32[] = fxq.amax(%w_e0)
%w_e1 : bf16[32,32] = fxq.slice(%w, 1)
%w_e1_amax : f32[] = fxq.amax(%w_e1)
%w_e0_group_amax : f32[] = fxq.sync([%w_e0_amax, %w_e1_amax])
%w_e0_q : bf16[32,32] = fxq.quantize(%w_e0, %w_e0_group_amax, format='nvfp4', scale='max')
%w_e1_q : bf16[32,32] = fxq.quantize(%w_e1, %w_e0_group_amax, format='nvfp4', scale='max')
%w_q : bf16[2,32,32] = fxq.stack([%w_e0_q, %w_e1_q])
%y : bf16[4,32] = fxq.expert_linear(%x, %w_q, %ids)
return [%y]
--- after
%w : bf16[2,32,32] = @mlp.experts.gate_up_proj
%w_e0 : bf16[32,32] = fxq.slice(%w, 0)
%w_e0_amax : f32[] = fxq.amax(%w_e0)
%w_e1 : bf16[32,32] = fxq.slice(%w, 1)
%w_e1_amax : f32[] = fxq.amax(%w_e1)
%w_e0_group_amax : f32[] = fxq.sync([%w_e0_amax, %w_e1_amax])
%w_e0_packed : [u8[32,16], f8e4m3[32,2], f32[]] = fxq.pack(%w_e0, %w_e0_group_amax, format='nvfp4', scale='max')
%w_e0_packed_0 : none = fxq.store_rows('mlp.experts.gate_up_proj', %w_e0_packed, None, start=0, end=32, rows=[0, 32, 1], shape=[2, 32, 32], expert=0, experts=2, transposed=True)
%w_e1_packed : [u8[32,16], f8e4m3[32,2], f32[]] = fxq.pack(%w_e1, %w_e0_group_amax, format='nvfp4', scale='max')
%w_e1_packed_0 : none = fxq.store_rows('mlp.experts.gate_up_proj', %w_e1_packed, None, start=0, end=32, rows=[0, 32, 1], shape=[2, 32, 32], expert=1, experts=2, transposed=True)
return ()
