pass: quantize-experts
options: {required: false}
rewrites: 0
--- before
%x : bf16[4,32] = placeholder()
%w : bf16[16,32] = @mlp.up_proj.weight
%y : bf16[4,16] = aten.linear(%x, %w)
return [%y]
--- after
%x : bf16[4,32] = placeholder()
%w : bf16[16,32] = @mlp.up_proj.weight
%y : bf16[4,16] = aten.linear(%x, %w)
return [%y]
