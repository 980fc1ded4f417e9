pass: fuse-experts
--- before
%tokens : bf16[1,4,32] = placeholder()
%x : bf16[3,4,32] = aten.expand(%tokens, [3, -1, -1])
%b : bf16[3,1,16] = @experts.b
%w : bf16[3,32,16] = @experts.w
%y : bf16[3,4,16] = aten.baddbmm(%b, %x, %w)
return [%y]
--- error
VerifyError: aten.baddbmm
