pass: fuse-experts
rewrites: 2
--- before
%x : bf16[4,32] = placeholder()
%w : bf16[3,16,32] = @moe.input_linear.weight
%w0 : bf16[16,32] = aten.select.int(%w, 0, 0)
%y0 : bf16[4,16] = aten.linear(%x, %w0)
%w2 : bf16[16,32] = aten.select.int(%w, 0, -1)
%y2 : bf16[4,16] = aten.linear(%x, %w2)
return [%y0, %y2]
--- after
%x : bf16[4,32] = placeholder()
%w : bf16[3,16,32] = @moe.input_linear.weight
%w_e0 : bf16[16,32] = fxq.slice(%w, 0)
%y0 : bf16[4,16] = aten.linear(%x, %w_e0)
%w_e2 : bf16[16,32] = fxq.slice(%w, 2)
%y2 : bf16[4,16] = aten.linear(%x, %w_e2)
return [%y0, %y2]
