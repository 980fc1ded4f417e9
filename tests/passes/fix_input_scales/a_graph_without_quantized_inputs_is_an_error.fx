pass: fix-input-scales
--- before
%x : bf16[4,32] = placeholder()
%w : bf16[32,32] = @w
%y : bf16[4,32] = aten.linear(%x, %w)
return [%y]
--- error
VerifyError: fix-input-scales rewrote nothing: expected quantized inputs
