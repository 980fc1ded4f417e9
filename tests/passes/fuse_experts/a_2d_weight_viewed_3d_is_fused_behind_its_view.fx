pass: fuse-experts
rewrites: 2
--- before
%x : bf16[4,32] = placeholder()
%ids : i64[4] = placeholder()
%w1 : bf16[48,32] = @ffn.experts.mlp.w1
%w1_3d : bf16[3,16,32] = aten.view(%w1, [3, 16, 32])
%picked : bf16[4,16,32] = aten.index.Tensor(%w1_3d, [%ids])
%column : bf16[4,32,1] = aten.unsqueeze(%x, -1)
%up : bf16[4,16,1] = aten.bmm(%picked, %column)
%h : bf16[4,16] = aten.squeeze.dim(%up, -1)
%row : bf16[4,1,16] = aten.unsqueeze(%h, 1)
%w2 : bf16[48,32] = @ffn.experts.mlp.w2
%w2_3d : bf16[3,16,32] = aten.view(%w2, [3, 16, 32])
%picked_2 : bf16[4,16,32] = aten.index.Tensor(%w2_3d, [%ids])
%down : bf16[4,1,32] = aten.bmm(%row, %picked_2)
%y : bf16[4,32] = aten.squeeze.dim(%down, 1)
return [%y]
--- after
%x : bf16[4,32] = placeholder()
%ids : i64[4] = placeholder()
%w1 : bf16[48,32] = @ffn.experts.mlp.w1
%w1_3d : bf16[3,16,32] = aten.view(%w1, [3, 16, 32])
%w2 : bf16[48,32] = @ffn.experts.mlp.w2
%w2_3d : bf16[3,16,32] = aten.view(%w2, [3, 16, 32])
%up_experts : bf16[4,16] = fxq.expert_linear(%x, %w1_3d, %ids)
%w2_3d_t : bf16[3,32,16] = aten.transpose.int(%w2_3d, 1, 2)
%down_experts : bf16[4,32] = fxq.expert_linear(%up_experts, %w2_3d_t, %ids)
return [%down_experts]
