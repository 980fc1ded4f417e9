pass: quantize-experts
rewrites: 6
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
--- after
%x : bf16[6,32] = placeholder()
%r : bf16[2,32] = @router.weight
%scores : bf16[6,2] = aten.linear(%x, %r)
%top : (bf16[6,1], i64[6,1]) = aten.topk(%scores, 1)
%chosen : i64[6,1] = operator.getitem(%top, 1)
%is0 : bool[6,1] = aten.eq.Scalar(%chosen, 0)
%first0 : bool[6] = aten.select.int(%is0, 1, 0)
%ids0 : i64[6] = aten.argsort(%first0)
%x0 : bf16[6,32] = aten.index.Tensor(%x, [%ids0])
%gate0_input_amax : f32[] = fxq.amax(%x0)
%gate0_input_q : bf16[6,32] = fxq.quantize(%x0, %gate0_input_amax, format='nvfp4', scale='dynamic')
%gate0 : bf16[16,32] = @experts.0.gate_proj.weight
%gate0_amax : f32[] = fxq.amax(%gate0)
%gate0_q : bf16[16,32] = fxq.quantize(%gate0, %gate0_amax, format='nvfp4', scale='max')
%g0 : bf16[6,16] = aten.linear(%gate0_input_q, %gate0_q)
%act0 : bf16[6,16] = aten.silu(%g0)
%up0 : bf16[16,32] = @experts.0.up_proj.weight
%up0_amax : f32[] = fxq.amax(%up0)
%up0_q : bf16[16,32] = fxq.quantize(%up0, %up0_amax, format='nvfp4', scale='max')
%u0 : bf16[6,16] = aten.linear(%gate0_input_q, %up0_q)
%h0 : bf16[6,16] = aten.mul.Tensor(%act0, %u0)
%down0_input_amax : f32[] = fxq.amax(%h0)
%down0_input_q : bf16[6,16] = fxq.quantize(%h0, %down0_input_amax, format='nvfp4', scale='dynamic')
%down0 : bf16[32,16] = @experts.0.down_proj.weight
%down0_amax : f32[] = fxq.amax(%down0)
%down0_q : bf16[32,16] = fxq.quantize(%down0, %down0_amax, format='nvfp4', scale='max')
%y0 : bf16[6,32] = aten.linear(%down0_input_q, %down0_q)
%is1 : bool[6,1] = aten.eq.Scalar(%chosen, 1)
%first1 : bool[6] = aten.select.int(%is1, 1, 0)
%ids1 : i64[6] = aten.argsort(%first1)
%x1 : bf16[6,32] = aten.index.Tensor(%x, [%ids1])
%gate1_input_amax : f32[] = fxq.amax(%x1)
%gate1_input_q : bf16[6,32] = fxq.quantize(%x1, %gate1_input_amax, format='nvfp4', scale='dynamic')
%gate1 : bf16[16,32] = @experts.1.gate_proj.weight
%gate1_amax : f32[] = fxq.amax(%gate1)
%gate1_q : bf16[16,32] = fxq.quantize(%gate1, %gate1_amax, format='nvfp4', scale='max')
%g1 : bf16[6,16] = aten.linear(%gate1_input_q, %gate1_q)
%act1 : bf16[6,16] = aten.silu(%g1)
%up1 : bf16[16,32] = @experts.1.up_proj.weight
%up1_amax : f32[] = fxq.amax(%up1)
%up1_q : bf16[16,32] = fxq.quantize(%up1, %up1_amax, format='nvfp4', scale='max')
%u1 : bf16[6,16] = aten.linear(%gate1_input_q, %up1_q)
%h1 : bf16[6,16] = aten.mul.Tensor(%act1, %u1)
%down1_input_amax : f32[] = fxq.amax(%h1)
%down1_input_q : bf16[6,16] = fxq.quantize(%h1, %down1_input_amax, format='nvfp4', scale='dynamic')
%down1 : bf16[32,16] = @experts.1.down_proj.weight
%down1_amax : f32[] = fxq.amax(%down1)
%down1_q : bf16[32,16] = fxq.quantize(%down1, %down1_amax, format='nvfp4', scale='max')
%y1 : bf16[6,32] = aten.linear(%down1_input_q, %down1_q)
return [%y0, %y1]
