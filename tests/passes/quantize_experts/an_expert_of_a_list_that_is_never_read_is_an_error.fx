pass: quantize-experts
hub:
  tensors:
    experts.0.gate_proj.weight: bf16[16,32]
    experts.0.up_proj.weight: bf16[16,32]
    experts.0.down_proj.weight: bf16[32,16]
    experts.1.gate_proj.weight: bf16[16,32]
    experts.1.up_proj.weight: bf16[16,32]
    experts.1.down_proj.weight: bf16[32,16]
    experts.2.gate_proj.weight: bf16[16,32]
    experts.2.up_proj.weight: bf16[16,32]
    experts.2.down_proj.weight: bf16[32,16]
  stored:
    experts.0.gate_proj.weight: {keys: [[experts.0.gate_proj.weight]]}
    experts.0.up_proj.weight: {keys: [[experts.0.up_proj.weight]]}
    experts.0.down_proj.weight: {keys: [[experts.0.down_proj.weight]]}
    experts.1.gate_proj.weight: {keys: [[experts.1.gate_proj.weight]]}
    experts.1.up_proj.weight: {keys: [[experts.1.up_proj.weight]]}
    experts.1.down_proj.weight: {keys: [[experts.1.down_proj.weight]]}
    experts.2.gate_proj.weight: {keys: [[experts.2.gate_proj.weight]]}
    experts.2.up_proj.weight: {keys: [[experts.2.up_proj.weight]]}
    experts.2.down_proj.weight: {keys: [[experts.2.down_proj.weight]]}
--- before
%x : bf16[6,32] = placeholder()
%r : bf16[2,32] = @router.weight
%scores : bf16[6,2] = aten.linear(%x, %r)
%top : (bf16[6,1], i64[6,1]) = aten.topk(%scores, 1)
%chosen : i64[6,1] = operator.getitem(%top, 1)
%is0 : bool[6,1] = aten.eq.Scalar(%chosen, 0)
%first0 : bool[6] = aten.select.int(%is0, 1, 0)
%ids0 : i64[6] = aten.argsort(%first0)
%x0 : bf16[6,32] = aten.index.Tensor(%x, [%ids0])
%gate0 : bf16[16,32] = @experts.0.gate_proj.weight
%g0 : bf16[6,16] = aten.linear(%x0, %gate0)
%act0 : bf16[6,16] = aten.silu(%g0)
%up0 : bf16[16,32] = @experts.0.up_proj.weight
%u0 : bf16[6,16] = aten.linear(%x0, %up0)
%h0 : bf16[6,16] = aten.mul.Tensor(%act0, %u0)
%down0 : bf16[32,16] = @experts.0.down_proj.weight
%y0 : bf16[6,32] = aten.linear(%h0, %down0)
%is1 : bool[6,1] = aten.eq.Scalar(%chosen, 1)
%first1 : bool[6] = aten.select.int(%is1, 1, 0)
%ids1 : i64[6] = aten.argsort(%first1)
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
--- error
VerifyError: experts.2.gate_proj.weight: the graph never reads this expert, as it does experts.
and 2 more weights
