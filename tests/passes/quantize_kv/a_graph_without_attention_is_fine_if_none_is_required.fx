pass: quantize-kv
options: {required: false}
rewrites: 0
--- before
%x : bf16[6,16] = placeholder()
%w : bf16[4,16] = @w
%y : bf16[6,4] = aten.linear(%x, %w)
return [%y]
--- after
%x : bf16[6,16] = placeholder()
%w : bf16[4,16] = @w
%y : bf16[6,4] = aten.linear(%x, %w)
return [%y]
