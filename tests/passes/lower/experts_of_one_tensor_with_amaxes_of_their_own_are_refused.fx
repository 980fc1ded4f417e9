pass: lower
hub:
  tensors: {block.input_linear.weight: "bf16[2,32,32]"}
  stored:
    mlp.experts.gate_up_proj: {keys: [[block.input_linear.weight]]}
--- before
%x : bf16[4,32] = placeholder()
%router : bf16[2,32] = @mlp.gate.weight
%r : bf16[4,2] = aten.linear(%x, %router)
%ids : i64[4] = aten.argmax(%r, -1)
%w : bf16[2,32,32] = @mlp.experts.gate_up_proj
%w_e0 : bf16[32,32] = fxq.slice(%w, 0)
%w_e0_amax : f32[] = fxq.amax(%w_e0)
%w_e0_q : bf16[32,32] = fxq.quantize(%w_e0, %w_e0_amax, format='nvfp4', scale='max')
%w_e1 : bf16[32,32] = fxq.slice(%w, 1)
%w_e1_amax : f32[] = fxq.amax(%w_e1)
%w_e1_q : bf16[32,32] = fxq.quantize(%w_e1, %w_e1_amax, format='nvfp4', scale='max')
%w_q : bf16[2,32,32] = fxq.stack([%w_e0_q, %w_e1_q])
%y : bf16[4,32] = fxq.expert_linear(%x, %w_q, %ids)
return [%y]
--- error
VerifyError: lower requires amaxes_shared
block.input_linear.weight
