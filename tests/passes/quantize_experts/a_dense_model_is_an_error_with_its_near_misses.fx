pass: quantize-experts
--- before
%x : bf16[4,32] = placeholder()
%w : bf16[16,32] = @mlp.up_proj.weight
%y : bf16[4,16] = aten.linear(%x, %w)
return [%y]
--- error
VerifyError: quantize-experts rewrote nothing
%y: expected fxq.slice, found get_attr at %w
