pass: quantize-linears
options: {skip: ["*up_proj"]}
--- before
%x : bf16[4,32] = placeholder()
%gate : bf16[16,32] = @mlp.gate_proj.weight
%g : bf16[4,16] = aten.linear(%x, %gate)
%act : bf16[4,16] = aten.silu(%g)
%up : bf16[16,32] = @mlp.up_proj.weight
%u : bf16[4,16] = aten.linear(%x, %up)
%h : bf16[4,16] = aten.mul.Tensor(%act, %u)
%last : bf16[8,16] = @lm_head.weight
%logits : bf16[4,8] = aten.linear(%h, %last)
return [%logits]
--- error
VerifyError: engines fuse gate/up
mlp.gate_proj.weight would be, mlp.up_proj.weight not
