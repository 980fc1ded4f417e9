pass: quantize-linears
options: {weights: fp8, inputs: fp8}
rewrites: 1
--- before
%x : bf16[4,24] = placeholder()
%w : bf16[16,24] = @up_proj.weight
%y : bf16[4,16] = aten.linear(%x, %w)
%last : bf16[8,16] = @lm_head.weight
%logits : bf16[4,8] = aten.linear(%y, %last)
return [%logits]
--- after
%x : bf16[4,24] = placeholder()
%w_input_amax : f32[] = fxq.amax(%x)
%w_input_q : bf16[4,24] = fxq.quantize(%x, %w_input_amax, format='fp8', scale='static')
%w : bf16[16,24] = @up_proj.weight
%w_amax : f32[] = fxq.amax(%w)
%w_q : bf16[16,24] = fxq.quantize(%w, %w_amax, format='fp8', scale='max')
%y : bf16[4,16] = aten.linear(%w_input_q, %w_q)
%last : bf16[8,16] = @lm_head.weight
%logits : bf16[4,8] = aten.linear(%y, %last)
return [%logits]
