pass: lower
rewrites: 2
hub:
  tensors: {mlp.experts.up_proj: "bf16[2,16,32]"}
  stored:
    mlp.experts.up_proj: {keys: [[mlp.experts.up_proj]]}
  names:
    mlp.experts.up_proj: {keys: [[mlp.experts.0.up_proj.weight, mlp.experts.1.up_proj.weight]], rows: [16], stacked: true}
--- before
%x : bf16[4,32] = placeholder()
%ids : i64[4] = placeholder()
%w : bf16[2,16,32] = @mlp.experts.up_proj
%w_e0 : bf16[16,32] = fxq.slice(%w, 0)
%w_e0_amax : f32[] = fxq.amax(%w_e0)
%w_e0_q : bf16[16,32] = fxq.quantize(%w_e0, %w_e0_amax, format='nvfp4', scale='max')
%w_e1 : bf16[16,32] = fxq.slice(%w, 1)
%w_e1_amax : f32[] = fxq.amax(%w_e1)
%w_e1_q : bf16[16,32] = fxq.quantize(%w_e1, %w_e1_amax, format='nvfp4', scale='max')
%w_q : bf16[2,16,32] = fxq.stack([%w_e0_q, %w_e1_q])
%y : bf16[4,16] = fxq.expert_linear(%x, %w_q, %ids)
return [%y]
--- after
%w : bf16[2,16,32] = @mlp.experts.up_proj
%w_e0 : bf16[16,32] = fxq.slice(%w, 0)
%w_e0_amax : f32[] = fxq.amax(%w_e0)
%w_e0_packed : [u8[16,16], f8e4m3[16,2], f32[]] = fxq.pack(%w_e0, %w_e0_amax, format='nvfp4', scale='max')
%w_e0_packed_0 : none = fxq.store_linear('mlp.experts.0.up_proj', %w_e0_packed, None, start=0, end=16)
%w_e1 : bf16[16,32] = fxq.slice(%w, 1)
%w_e1_amax : f32[] = fxq.amax(%w_e1)
%w_e1_packed : [u8[16,16], f8e4m3[16,2], f32[]] = fxq.pack(%w_e1, %w_e1_amax, format='nvfp4', scale='max')
%w_e1_packed_0 : none = fxq.store_linear('mlp.experts.1.up_proj', %w_e1_packed, None, start=0, end=16)
return ()
