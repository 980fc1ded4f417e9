pass: quantize-experts
--- before
%x : bf16[6,32] = placeholder()
%ids0 : i64[3] = placeholder()
%ids1 : i64[2] = placeholder()
%x0 : bf16[3,32] = aten.index.Tensor(%x, [%ids0])
%w0 : bf16[16,32] = @experts.0.up_proj.weight
%y0 : bf16[3,16] = aten.linear(%x0, %w0)
%x1 : bf16[2,32] = aten.index.Tensor(%x, [%ids1])
%w1 : bf16[16,32] = @experts.1.up_proj.weight
%y1 : bf16[2,16] = aten.linear(%x1, %w1)
return [%y0, %y1]
--- error
VerifyError: experts.0.up_proj.weight and 1 more read tokens picked for them: experts held as linears
quantize-linears takes linears
