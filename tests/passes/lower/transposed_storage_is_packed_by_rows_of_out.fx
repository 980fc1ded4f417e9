pass: lower
rewrites: 4
hub:
  tensors:
    mlp.experts.0.gate_proj.weight: bf16[16,32]
    mlp.experts.0.up_proj.weight: bf16[16,32]
    mlp.experts.1.gate_proj.weight: bf16[16,32]
    mlp.experts.1.up_proj.weight: bf16[16,32]
    mlp.gate.weight: bf16[2,32]
  stored:
    mlp.experts.gate_up_proj:
      keys:
        - [mlp.experts.0.gate_proj.weight, mlp.experts.1.gate_proj.weight]
        - [mlp.experts.0.up_proj.weight, mlp.experts.1.up_proj.weight]
      rows: [16, 16]
      stacked: true
      transposed: true
    mlp.gate.weight: {keys: [[mlp.gate.weight]]}
--- before
%x : bf16[4,32] = placeholder()
%router : bf16[2,32] = @mlp.gate.weight
%r : bf16[4,2] = aten.linear(%x, %router)
%ids : i64[4] = aten.argmax(%r, -1)
%w : bf16[2,32,32] = @mlp.experts.gate_up_proj
%wt : bf16[2,32,32] = aten.transpose.int(%w, 1, 2)
%wt_e0 : bf16[32,32] = fxq.slice(%wt, 0)
%wt_e0_amax : f32[] = fxq.amax(%wt_e0)
%wt_e0_q : bf16[32,32] = fxq.quantize(%wt_e0, %wt_e0_amax, format='nvfp4', scale='max')
%wt_e1 : bf16[32,32] = fxq.slice(%wt, 1)
%wt_e1_amax : f32[] = fxq.amax(%wt_e1)
%wt_e1_q : bf16[32,32] = fxq.quantize(%wt_e1, %wt_e1_amax, format='nvfp4', scale='max')
%wt_q : bf16[2,32,32] = fxq.stack([%wt_e0_q, %wt_e1_q])
%y : bf16[4,32] = fxq.expert_linear(%x, %wt_q, %ids)
return [%y]
--- after
%w : bf16[2,32,32] = @mlp.experts.gate_up_proj
%wt : bf16[2,32,32] = aten.transpose.int(%w, 1, 2)
%wt_e0 : bf16[32,32] = fxq.slice(%wt, 0)
%wt_e0_amax : f32[] = fxq.amax(%wt_e0)
%wt_e0_packed : [u8[32,16], f8e4m3[32,2], f32[]] = fxq.pack(%wt_e0, %wt_e0_amax, format='nvfp4', scale='max')
%wt_e0_packed_0 : none = fxq.store_linear('mlp.experts.0.gate_proj', %wt_e0_packed, None, start=0, end=16)
%wt_e0_packed_16 : none = fxq.store_linear('mlp.experts.0.up_proj', %wt_e0_packed, None, start=16, end=32)
%wt_e1 : bf16[32,32] = fxq.slice(%wt, 1)
%wt_e1_amax : f32[] = fxq.amax(%wt_e1)
%wt_e1_packed : [u8[32,16], f8e4m3[32,2], f32[]] = fxq.pack(%wt_e1, %wt_e1_amax, format='nvfp4', scale='max')
%wt_e1_packed_0 : none = fxq.store_linear('mlp.experts.1.gate_proj', %wt_e1_packed, None, start=0, end=16)
%wt_e1_packed_16 : none = fxq.store_linear('mlp.experts.1.up_proj', %wt_e1_packed, None, start=16, end=32)
%mlp_gate_weight_ : bf16[2,32] = fxq.load('mlp.gate.weight', shape=[2, 32], dtype=torch.bfloat16)
%mlp_gate_weight_store : none = fxq.store('mlp.gate.weight', %mlp_gate_weight_)
return ()
