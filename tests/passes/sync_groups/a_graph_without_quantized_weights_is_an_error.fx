pass: sync-groups
--- before
%x : bf16[4,32] = placeholder()
%a : bf16[16,32] = @a.weight
%y : bf16[4,16] = aten.linear(%x, %a)
return [%y]
--- error
VerifyError: sync-groups: no weight is quantized
quantize-linears or quantize-experts
