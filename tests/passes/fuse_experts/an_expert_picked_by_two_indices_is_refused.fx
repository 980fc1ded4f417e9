pass: fuse-experts
--- before
%x : bf16[4,32] = placeholder()
%ids : i64[4,1] = placeholder()
%cols : i64[16] = placeholder()
%w : bf16[3,16,32] = @experts.w
%picked : bf16[4,16,32] = aten.index.Tensor(%w, [%ids, %cols])
%column : bf16[4,32,1] = aten.unsqueeze(%x, -1)
%y : bf16[4,16,1] = aten.bmm(%picked, %column)
return [%y]
--- error
VerifyError: expected a list of 1, found [%ids, %cols]
