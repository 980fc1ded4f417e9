pass: quantize-linears
rewrites: 2
--- before
%x : bf16[4,32] = placeholder()
%w : bf16[32,32] = @shared_block.weight
%a : bf16[4,32] = aten.linear(%x, %w)
%relu : bf16[4,32] = aten.relu(%a)
%b : bf16[4,32] = aten.linear(%relu, %w)
%last : bf16[8,32] = @lm_head.weight
%logits : bf16[4,8] = aten.linear(%b, %last)
return [%logits]
--- after
%x : bf16[4,32] = placeholder()
%w_input_amax : f32[] = fxq.amax(%x)
%w_input_q : bf16[4,32] = fxq.quantize(%x, %w_input_amax, format='nvfp4', scale='dynamic')
%w : bf16[32,32] = @shared_block.weight
%w_amax : f32[] = fxq.amax(%w)
%w_q : bf16[32,32] = fxq.quantize(%w, %w_amax, format='nvfp4', scale='max')
%a : bf16[4,32] = aten.linear(%w_input_q, %w_q)
%relu : bf16[4,32] = aten.relu(%a)
%w_input_amax_1 : f32[] = fxq.amax(%relu)
%w_input_q_1 : bf16[4,32] = fxq.quantize(%relu, %w_input_amax_1, format='nvfp4', scale='dynamic')
%b : bf16[4,32] = aten.linear(%w_input_q_1, %w_q)
%last : bf16[8,32] = @lm_head.weight
%logits : bf16[4,8] = aten.linear(%b, %last)
return [%logits]
