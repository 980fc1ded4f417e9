pass: fuse-experts
rewrites: 1
--- before
%x : bf16[4,32] = placeholder()
%w : bf16[3,32,16] = @experts.w
%w0 : bf16[32,16] = aten.select.int(%w, 0, 0)
%w0t : bf16[16,32] = aten.t(%w0)
%y : bf16[4,16] = aten.linear(%x, %w0t)
return [%y]
--- after
%x : bf16[4,32] = placeholder()
%w : bf16[3,32,16] = @experts.w
%w_t : bf16[3,16,32] = aten.transpose.int(%w, 1, 2)
%w_t_e0 : bf16[16,32] = fxq.slice(%w_t, 0)
%y : bf16[4,16] = aten.linear(%x, %w_t_e0)
return [%y]
