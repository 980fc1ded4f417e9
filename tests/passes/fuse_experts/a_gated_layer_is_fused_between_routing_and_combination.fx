pass: fuse-experts
rewrites: 2
--- before
%x : bf16[2,32] = placeholder()
%router : bf16[3,32] = @mlp.gate.weight
%logits : bf16[2,3] = aten.linear(%x, %router)
%top : (bf16[2,2], i64[2,2]) = aten.topk(%logits, 2)
%scores : bf16[2,2] = operator.getitem(%top, 0)
%chosen : i64[2,2] = operator.getitem(%top, 1)
%ids : i64[4] = aten.reshape(%chosen, [-1])
%x_1 : bf16[2,1,32] = aten.unsqueeze(%x, 1)
%x_2 : bf16[2,2,32] = aten.expand(%x_1, [2, 2, 32])
%tokens : bf16[4,32] = aten.reshape(%x_2, [-1, 32])
%gate_up : bf16[3,32,32] = @mlp.experts.gate_up_proj
%gate_up_ids : bf16[4,32,32] = aten.index.Tensor(%gate_up, [%ids])
%column : bf16[4,32,1] = aten.unsqueeze(%tokens, -1)
%bmm : bf16[4,32,1] = aten.bmm(%gate_up_ids, %column)
%up_out : bf16[4,32] = aten.squeeze.dim(%bmm, -1)
%halves : [bf16[4,16], bf16[4,16]] = aten.split.Tensor(%up_out, 16, -1)
%gate : bf16[4,16] = operator.getitem(%halves, 0)
%up : bf16[4,16] = operator.getitem(%halves, 1)
%act : bf16[4,16] = aten.silu(%gate)
%h : bf16[4,16] = aten.mul.Tensor(%act, %up)
%down : bf16[3,32,16] = @mlp.experts.down_proj
%down_ids : bf16[4,32,16] = aten.index.Tensor(%down, [%ids])
%h_column : bf16[4,16,1] = aten.unsqueeze(%h, -1)
%bmm_1 : bf16[4,32,1] = aten.bmm(%down_ids, %h_column)
%down_out : bf16[4,32] = aten.squeeze.dim(%bmm_1, -1)
%score : bf16[4,1] = aten.reshape(%scores, [-1, 1])
%weighted : bf16[4,32] = aten.mul.Tensor(%down_out, %score)
%by_token : bf16[2,2,32] = aten.view(%weighted, [2, 2, 32])
%y : bf16[2,32] = aten.sum.dim_IntList(%by_token, [1])
return [%y]
--- after
%x : bf16[2,32] = placeholder()
%router : bf16[3,32] = @mlp.gate.weight
%logits : bf16[2,3] = aten.linear(%x, %router)
%top : (bf16[2,2], i64[2,2]) = aten.topk(%logits, 2)
%scores : bf16[2,2] = operator.getitem(%top, 0)
%chosen : i64[2,2] = operator.getitem(%top, 1)
%ids : i64[4] = aten.reshape(%chosen, [-1])
%x_1 : bf16[2,1,32] = aten.unsqueeze(%x, 1)
%x_2 : bf16[2,2,32] = aten.expand(%x_1, [2, 2, 32])
%tokens : bf16[4,32] = aten.reshape(%x_2, [-1, 32])
%gate_up : bf16[3,32,32] = @mlp.experts.gate_up_proj
%bmm_experts : bf16[4,32] = fxq.expert_linear(%tokens, %gate_up, %ids)
%halves : [bf16[4,16], bf16[4,16]] = aten.split.Tensor(%bmm_experts, 16, -1)
%gate : bf16[4,16] = operator.getitem(%halves, 0)
%up : bf16[4,16] = operator.getitem(%halves, 1)
%act : bf16[4,16] = aten.silu(%gate)
%h : bf16[4,16] = aten.mul.Tensor(%act, %up)
%score : bf16[4,1] = aten.reshape(%scores, [-1, 1])
%down : bf16[3,32,16] = @mlp.experts.down_proj
%bmm_1_experts : bf16[4,32] = fxq.expert_linear(%h, %down, %ids)
%weighted : bf16[4,32] = aten.mul.Tensor(%bmm_1_experts, %score)
%by_token : bf16[2,2,32] = aten.view(%weighted, [2, 2, 32])
%y : bf16[2,32] = aten.sum.dim_IntList(%by_token, [1])
return [%y]
