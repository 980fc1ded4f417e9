pass: lower
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
%gate_q : bf16[16,32] = fxq.quantize(%gate, %gate_amax, format='nvfp4', scale='max')
%g : bf16[4,16] = aten.linear(%x, %gate_q)
%act : bf16[4,16] = aten.silu(%g)
%u : bf16[4,16] = aten.linear(%x, %up)
%h : bf16[4,16] = aten.mul.Tensor(%act, %u)
return [%h]
--- error
VerifyError: mlp.gate_up_proj.weight
mlp.gate_proj.weight, which is quantized
mlp.up_proj.weight, which is not
