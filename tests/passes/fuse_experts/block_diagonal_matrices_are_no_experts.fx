pass: fuse-experts
rewrites: 0
--- before
%x : bf16[4,96] = placeholder()
%blocks : bf16[4,3,32] = aten.view(%x, [4, 3, 32])
%each : bf16[3,4,32] = aten.permute(%blocks, [1, 0, 2])
%w : bf16[3,32,32] = @lru.input_gate
%y : bf16[3,4,32] = aten.bmm(%each, %w)
return [%y]
--- after
%x : bf16[4,96] = placeholder()
%blocks : bf16[4,3,32] = aten.view(%x, [4, 3, 32])
%each : bf16[3,4,32] = aten.permute(%blocks, [1, 0, 2])
%w : bf16[3,32,32] = @lru.input_gate
%y : bf16[3,4,32] = aten.bmm(%each, %w)
return [%y]
