pass: fuse-experts
rewrites: 1
inputs: {slots: [[0, 1], [2, 3], [1, 0]]}
--- before
%tokens : bf16[4,32] = placeholder()
%slots : i64[3,2] = placeholder()
%xs : bf16[3,2,32] = aten.index.Tensor(%tokens, [%slots])
%w : bf16[3,32,16] = @experts.w
%y : bf16[3,2,16] = aten.bmm(%xs, %w)
return [%y]
--- after
%tokens : bf16[4,32] = placeholder()
%slots : i64[3,2] = placeholder()
%xs : bf16[3,2,32] = aten.index.Tensor(%tokens, [%slots])
%w : bf16[3,32,16] = @experts.w
%w_t : bf16[3,16,32] = aten.transpose.int(%w, 1, 2)
%y_tokens : int(2) = aten.sym_size.int(%xs, 1)
%y_each : i64[3] = aten.arange(3, device=device('cpu'))
%y_ids : i64[6] = aten.repeat_interleave.self_int(%y_each, %y_tokens)
%y_x : bf16[6,32] = aten.reshape(%xs, [-1, 32])
%y_experts : bf16[6,16] = fxq.expert_linear(%y_x, %w_t, %y_ids)
%y_y : bf16[3,2,16] = aten.view(%y_experts, [3, %y_tokens, 16])
return [%y_y]
