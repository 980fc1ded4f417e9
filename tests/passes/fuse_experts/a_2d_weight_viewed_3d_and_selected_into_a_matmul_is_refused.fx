pass: fuse-experts
--- before
%x : bf16[4,16] = placeholder()
%w2 : bf16[48,32] = @ffn.experts.mlp.w2
%w2_3d : bf16[3,16,32] = aten.view(%w2, [3, 16, 32])
%w2_0 : bf16[16,32] = aten.select.int(%w2_3d, 0, 0)
%y : bf16[4,32] = aten.matmul(%x, %w2_0)
return [%y]
--- error
VerifyError: fuse-experts: a 3-D weight reaches a matmul in a form no pattern knows
%y
