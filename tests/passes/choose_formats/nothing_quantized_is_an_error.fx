pass: choose-formats
--- before
%x : bf16[4,32] = placeholder()
%a : bf16[64,32] = @a.weight
%y : bf16[4,64] = aten.linear(%x, %a)
return [%y]
--- error
VerifyError: choose-formats rewrote nothing: expected weights that an earlier pass quantized
