pass: lower
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
    mlp.gate.weight: {keys: [[mlp.gate.weight]]}
--- before
%x : bf16[4,32] = placeholder()
%router : bf16[2,32] = @mlp.gate.weight
%r : bf16[4,2] = aten.linear(%x, %router)
%ids : i64[4] = aten.argmax(%r, -1)
%w : bf16[2,32,32] = @mlp.experts.gate_up_proj
%w_e0 : bf16[32,32] = fxq.slice(%w, 0)
%w_e0_amax : f32[] = fxq.amax(%w_e0)
%w_e0_q : bf16[32,32] = fxq.quantize(%w_e0, %w_e0_amax, format='nvfp4', scale='max')
%y : bf16[4,32] = aten.linear(%x, %w_e0_q)
return [%y, %ids]
--- error
VerifyError: mlp.experts.gate_up_proj
