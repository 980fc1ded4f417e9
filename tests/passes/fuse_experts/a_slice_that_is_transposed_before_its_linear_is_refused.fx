pass: fuse-experts
--- before
%x : bf16[4,32] = placeholder()
%w : bf16[3,32,16] = @experts.w
%w0 : bf16[32,16] = aten.select.int(%w, 0, 0)
%w0t : bf16[16,32] = aten.t(%w0)
%y : bf16[4,16] = aten.linear(%x, %w0t)
return [%y]
--- error
VerifyError: fuse-experts
%y
