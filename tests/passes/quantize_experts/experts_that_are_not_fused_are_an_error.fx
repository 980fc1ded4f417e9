pass: quantize-experts
--- before
%x : bf16[4,32] = placeholder()
%w : bf16[3,32,16] = @experts.w
%y : bf16[3,4,16] = aten.matmul(%x, %w)
return [%y]
--- error
VerifyError: quantize-experts requires experts_fused
@experts.w reaches %y
