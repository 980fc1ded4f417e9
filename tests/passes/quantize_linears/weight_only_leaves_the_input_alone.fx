pass: quantize-linears
options: {inputs: none}
rewrites: 1
--- before
%x : bf16[4,32] = placeholder()
%w : bf16[16,32] = @up_proj.weight
%y : bf16[4,16] = aten.linear(%x, %w)
%last : bf16[8,16] = @lm_head.weight
%logits : bf16[4,8] = aten.linear(%y, %last)
return [%logits]
--- after
%x : bf16[4,32] = placeholder()
%w : bf16[16,32] = @up_proj.weight
%w_amax : f32[] = fxq.amax(%w)
%w_q : bf16[16,32] = fxq.quantize(%w, %w_amax, format='nvfp4', scale='max')
%y : bf16[4,16] = aten.linear(%x, %w_q)
%last : bf16[8,16] = @lm_head.weight
%logits : bf16[4,8] = aten.linear(%y, %last)
return [%logits]
