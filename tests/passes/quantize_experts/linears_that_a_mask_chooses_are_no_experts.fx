pass: quantize-experts
options: {required: false}
--- before
%x : bf16[6,32] = placeholder()
%ids0 : i64[6] = placeholder()
%ids1 : i64[6] = placeholder()
%x0 : bf16[6,32] = aten.index.Tensor(%x, [%ids0])
%gate0 : bf16[16,32] = @experts.0.gate_proj.weight
%g0 : bf16[6,16] = aten.linear(%x0, %gate0)
%act0 : bf16[6,16] = aten.silu(%g0)
%up0 : bf16[16,32] = @experts.0.up_proj.weight
%u0 : bf16[6,16] = aten.linear(%x0, %up0)
%h0 : bf16[6,16] = aten.mul.Tensor(%act0, %u0)
%down0 : bf16[32,16] = @experts.0.down_proj.weight
%y0 : bf16[6,32] = aten.linear(%h0, %down0)
%x1 : bf16[6,32] = aten.index.Tensor(%x, [%ids1])
%gate1 : bf16[16,32] = @experts.1.gate_proj.weight
%g1 : bf16[6,16] = aten.linear(%x1, %gate1)
%act1 : bf16[6,16] = aten.silu(%g1)
%up1 : bf16[16,32] = @experts.1.up_proj.weight
%u1 : bf16[6,16] = aten.linear(%x1, %up1)
%h1 : bf16[6,16] = aten.mul.Tensor(%act1, %u1)
%down1 : bf16[32,16] = @experts.1.down_proj.weight
%y1 : bf16[6,32] = aten.linear(%h1, %down1)
return [%y0, %y1]
--- after
%x : bf16[6,32] = placeholder()
%ids0 : i64[6] = placeholder()
%ids1 : i64[6] = placeholder()
%x0 : bf16[6,32] = aten.index.Tensor(%x, [%ids0])
%gate0 : bf16[16,32] = @experts.0.gate_proj.weight
%g0 : bf16[6,16] = aten.linear(%x0, %gate0)
%act0 : bf16[6,16] = aten.silu(%g0)
%up0 : bf16[16,32] = @experts.0.up_proj.weight
%u0 : bf16[6,16] = aten.linear(%x0, %up0)
%h0 : bf16[6,16] = aten.mul.Tensor(%act0, %u0)
%down0 : bf16[32,16] = @experts.0.down_proj.weight
%y0 : bf16[6,32] = aten.linear(%h0, %down0)
%x1 : bf16[6,32] = aten.index.Tensor(%x, [%ids1])
%gate1 : bf16[16,32] = @experts.1.gate_proj.weight
%g1 : bf16[6,16] = aten.linear(%x1, %gate1)
%act1 : bf16[6,16] = aten.silu(%g1)
%up1 : bf16[16,32] = @experts.1.up_proj.weight
%u1 : bf16[6,16] = aten.linear(%x1, %up1)
%h1 : bf16[6,16] = aten.mul.Tensor(%act1, %u1)
%down1 : bf16[32,16] = @experts.1.down_proj.weight
%y1 : bf16[6,32] = aten.linear(%h1, %down1)
return [%y0, %y1]
