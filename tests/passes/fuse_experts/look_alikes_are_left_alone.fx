pass: fuse-experts
rewrites: 0
--- before
%ids : i64[1,4] = placeholder()
%table : bf16[8,32] = @embed_tokens.weight
%x : bf16[1,4,32] = aten.embedding(%table, %ids)
%norm : bf16[1,1,32] = @norm.weight
%normed : bf16[1,4,32] = aten.mul.Tensor(%x, %norm)
%keys : bf16[1,32,4] = aten.transpose.int(%normed, 1, 2)
%scores : bf16[1,4,4] = aten.bmm(%normed, %keys)
%mixed : bf16[1,4,32] = aten.bmm(%scores, %normed)
%channels : bf16[1,32,4] = aten.transpose.int(%mixed, 1, 2)
%kernel : bf16[32,1,3] = @conv.weight
%conv : bf16[1,32,4] = aten.conv1d(%channels, %kernel, None, [1], [1], [1], 32)
%back : bf16[1,4,32] = aten.transpose.int(%conv, 1, 2)
%o : bf16[16,32] = @o_proj.weight
%y : bf16[1,4,16] = aten.linear(%back, %o)
return [%y]
--- after
%ids : i64[1,4] = placeholder()
%table : bf16[8,32] = @embed_tokens.weight
%x : bf16[1,4,32] = aten.embedding(%table, %ids)
%norm : bf16[1,1,32] = @norm.weight
%normed : bf16[1,4,32] = aten.mul.Tensor(%x, %norm)
%keys : bf16[1,32,4] = aten.transpose.int(%normed, 1, 2)
%scores : bf16[1,4,4] = aten.bmm(%normed, %keys)
%mixed : bf16[1,4,32] = aten.bmm(%scores, %normed)
%channels : bf16[1,32,4] = aten.transpose.int(%mixed, 1, 2)
%kernel : bf16[32,1,3] = @conv.weight
%conv : bf16[1,32,4] = aten.conv1d(%channels, %kernel, None, [1], [1], [1], 32)
%back : bf16[1,4,32] = aten.transpose.int(%conv, 1, 2)
%o : bf16[16,32] = @o_proj.weight
%y : bf16[1,4,16] = aten.linear(%back, %o)
return [%y]
