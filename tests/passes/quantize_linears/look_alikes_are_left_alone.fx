pass: quantize-linears
rewrites: 1
--- before
%ids : i64[1,4] = placeholder()
%table : bf16[8,32] = @embed_tokens.weight
%x : bf16[1,4,32] = aten.embedding(%table, %ids)
%norm : bf16[32] = @norm.weight
%normed : bf16[1,4,32] = aten.mul.Tensor(%x, %norm)
%keys : bf16[1,32,4] = aten.transpose.int(%normed, 1, 2)
%scores : bf16[1,4,4] = aten.bmm(%normed, %keys)
%mixed : bf16[1,4,32] = aten.matmul(%scores, %normed)
%channels : bf16[1,32,4] = aten.transpose.int(%mixed, 1, 2)
%kernel : bf16[32,1,3] = @conv.weight
%conv : bf16[1,32,4] = aten.conv1d(%channels, %kernel, None, [1], [1], [1], 32)
%back : bf16[1,4,32] = aten.transpose.int(%conv, 1, 2)
%o : bf16[32,32] = @o_proj.weight
%y : bf16[1,4,32] = aten.linear(%back, %o)
%flat : bf16[4,32] = aten.view(%y, [4, 32])
%experts : bf16[3,16,32] = @experts.up_proj
%which : i64[4] = aten.view(%ids, [4])
%e : bf16[4,16] = fxq.expert_linear(%flat, %experts, %which)
%last : bf16[8,16] = @lm_head.weight
%logits : bf16[4,8] = aten.linear(%e, %last)
return [%logits]
--- after
%ids : i64[1,4] = placeholder()
%table : bf16[8,32] = @embed_tokens.weight
%x : bf16[1,4,32] = aten.embedding(%table, %ids)
%norm : bf16[32] = @norm.weight
%normed : bf16[1,4,32] = aten.mul.Tensor(%x, %norm)
%keys : bf16[1,32,4] = aten.transpose.int(%normed, 1, 2)
%scores : bf16[1,4,4] = aten.bmm(%normed, %keys)
%mixed : bf16[1,4,32] = aten.matmul(%scores, %normed)
%channels : bf16[1,32,4] = aten.transpose.int(%mixed, 1, 2)
%kernel : bf16[32,1,3] = @conv.weight
%conv : bf16[1,32,4] = aten.conv1d(%channels, %kernel, None, [1], [1], [1], 32)
%back : bf16[1,4,32] = aten.transpose.int(%conv, 1, 2)
%o_input_amax : f32[] = fxq.amax(%back)
%o_input_q : bf16[1,4,32] = fxq.quantize(%back, %o_input_amax, format='nvfp4', scale='dynamic')
%o : bf16[32,32] = @o_proj.weight
%o_amax : f32[] = fxq.amax(%o)
%o_q : bf16[32,32] = fxq.quantize(%o, %o_amax, format='nvfp4', scale='max')
%y : bf16[1,4,32] = aten.linear(%o_input_q, %o_q)
%flat : bf16[4,32] = aten.view(%y, [4, 32])
%which : i64[4] = aten.view(%ids, [4])
%experts : bf16[3,16,32] = @experts.up_proj
%e : bf16[4,16] = fxq.expert_linear(%flat, %experts, %which)
%last : bf16[8,16] = @lm_head.weight
%logits : bf16[4,8] = aten.linear(%e, %last)
return [%logits]
