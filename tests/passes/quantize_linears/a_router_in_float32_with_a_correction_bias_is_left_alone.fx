pass: quantize-linears
rewrites: 1
--- before
%x : bf16[4,32] = placeholder()
%x32 : f32[4,32] = aten._to_copy(%x, dtype=torch.float32)
%router : bf16[3,32] = @mlp.gate.weight
%router32 : f32[3,32] = aten._to_copy(%router, dtype=torch.float32)
%r : f32[4,3] = aten.linear(%x32, %router32)
%sigmoid : f32[4,3] = aten.sigmoid(%r)
%bias : f32[3] = @mlp.gate.e_score_correction_bias
%corrected : f32[4,3] = aten.add.Tensor(%sigmoid, %bias)
%top : (f32[4,1], i64[4,1]) = aten.topk(%corrected, 1)
%ids : i64[4,1] = operator.getitem(%top, 1)
%up : bf16[16,32] = @mlp.up_proj.weight
%u : bf16[4,16] = aten.linear(%x, %up)
return [%u, %ids]
--- after
%x : bf16[4,32] = placeholder()
%x32 : f32[4,32] = aten._to_copy(%x, dtype=torch.float32)
%router : bf16[3,32] = @mlp.gate.weight
%router32 : f32[3,32] = aten._to_copy(%router, dtype=torch.float32)
%r : f32[4,3] = aten.linear(%x32, %router32)
%sigmoid : f32[4,3] = aten.sigmoid(%r)
%bias : f32[3] = @mlp.gate.e_score_correction_bias
%corrected : f32[4,3] = aten.add.Tensor(%sigmoid, %bias)
%top : (f32[4,1], i64[4,1]) = aten.topk(%corrected, 1)
%ids : i64[4,1] = operator.getitem(%top, 1)
%up_input_amax : f32[] = fxq.amax(%x)
%up_input_q : bf16[4,32] = fxq.quantize(%x, %up_input_amax, format='nvfp4', scale='dynamic')
%up : bf16[16,32] = @mlp.up_proj.weight
%up_amax : f32[] = fxq.amax(%up)
%up_q : bf16[16,32] = fxq.quantize(%up, %up_amax, format='nvfp4', scale='max')
%u : bf16[4,16] = aten.linear(%up_input_q, %up_q)
return [%u, %ids]
--- miss
r: a router: %top chooses by its result
