pass: quantize-linears
rewrites: 1
--- before
%x : bf16[4,32] = placeholder()
%router : bf16[3,32] = @mlp.gate.weight
%r : bf16[4,3] = aten.linear(%x, %router)
%soft : bf16[4,3] = aten.softmax.int(%r, -1)
%top : (bf16[4], i64[4]) = aten.max.dim(%soft, -1)
%scores : i64[4] = operator.getitem(%top, 1)
%up : bf16[16,32] = @mlp.up_proj.weight
%u : bf16[4,16] = aten.linear(%x, %up)
return [%u, %scores]
--- after
%x : bf16[4,32] = placeholder()
%router : bf16[3,32] = @mlp.gate.weight
%r : bf16[4,3] = aten.linear(%x, %router)
%soft : bf16[4,3] = aten.softmax.int(%r, -1)
%top : (bf16[4], i64[4]) = aten.max.dim(%soft, -1)
%scores : i64[4] = operator.getitem(%top, 1)
%up_input_amax : f32[] = fxq.amax(%x)
%up_input_q : bf16[4,32] = fxq.quantize(%x, %up_input_amax, format='nvfp4', scale='dynamic')
%up : bf16[16,32] = @mlp.up_proj.weight
%up_amax : f32[] = fxq.amax(%up)
%up_q : bf16[16,32] = fxq.quantize(%up, %up_amax, format='nvfp4', scale='max')
%u : bf16[4,16] = aten.linear(%up_input_q, %up_q)
return [%u, %scores]
--- miss
r: a router: %top chooses by its result
