pass: fuse-experts
rewrites: 1
--- before
%tokens : bf16[1,4,32] = placeholder()
%x : bf16[3,4,32] = aten.expand(%tokens, [3, -1, -1])
%w : bf16[3,32,16] = @feed_forward.experts.gate_up_proj
%y : bf16[3,4,16] = aten.bmm(%x, %w)
return [%y]
--- after
%tokens : bf16[1,4,32] = placeholder()
%x : bf16[3,4,32] = aten.expand(%tokens, [3, -1, -1])
%w : bf16[3,32,16] = @feed_forward.experts.gate_up_proj
%w_t : bf16[3,16,32] = aten.transpose.int(%w, 1, 2)
%y_tokens : int(4) = aten.sym_size.int(%x, 1)
%y_each : i64[3] = aten.arange(3, device=device('cpu'))
%y_ids : i64[12] = aten.repeat_interleave.self_int(%y_each, %y_tokens)
%y_x : bf16[12,32] = aten.reshape(%x, [-1, 32])
%y_experts : bf16[12,16] = fxq.expert_linear(%y_x, %w_t, %y_ids)
%y_y : bf16[3,4,16] = aten.view(%y_experts, [3, %y_tokens, 16])
return [%y_y]
