pass: calibrate-hessian
options: {gram: diagonal}
rewrites: 1
--- before
%x : bf16[4,32] = placeholder()
%w : bf16[48,32] = @q.weight
%w_amax : f32[] = fxq.amax(%w)
%w_q : bf16[48,32] = fxq.quantize(%w, %w_amax, format='nvfp4', scale='max')
%y : bf16[4,48] = aten.linear(%x, %w_q)
return [%y]
--- after
%x : bf16[4,32] = placeholder()
%w : bf16[48,32] = @q.weight
%w_amax : f32[] = fxq.amax(%w)
%x_square_sum : f32[32] = fxq.square_sum(%x)
%x_square_sum_blocks : f32[2,16] = aten.view(%x_square_sum, [2, 16])
%x_square_sum_diagonal : f32[2,16,16] = aten.diag_embed(%x_square_sum_blocks)
%w_q : bf16[48,32] = fxq.quantize_weighted(%w, %w_amax, %x_square_sum_diagonal, format='nvfp4')
%y : bf16[4,48] = aten.linear(%x, %w_q)
return [%y]
