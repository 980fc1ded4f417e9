pass: quantize-linears
rewrites: 1
--- before
%x : bf16[4,32] = placeholder()
%b : bf16[16] = @h.0.attn.c_attn.bias
%w : bf16[32,16] = @h.0.attn.c_attn.weight
%y : bf16[4,16] = aten.addmm(%b, %x, %w)
%up : bf16[16,16] = @h.0.up.weight
%u : bf16[4,16] = aten.linear(%y, %up)
%last : bf16[8,16] = @lm_head.weight
%logits : bf16[4,8] = aten.linear(%u, %last)
return [%logits]
--- after
%x : bf16[4,32] = placeholder()
%b : bf16[16] = @h.0.attn.c_attn.bias
%w : bf16[32,16] = @h.0.attn.c_attn.weight
%y : bf16[4,16] = aten.addmm(%b, %x, %w)
%up_input_amax : f32[] = fxq.amax(%y)
%up_input_q : bf16[4,16] = fxq.quantize(%y, %up_input_amax, format='nvfp4', scale='dynamic')
%up : bf16[16,16] = @h.0.up.weight
%up_amax : f32[] = fxq.amax(%up)
%up_q : bf16[16,16] = fxq.quantize(%up, %up_amax, format='nvfp4', scale='max')
%u : bf16[4,16] = aten.linear(%up_input_q, %up_q)
%last : bf16[8,16] = @lm_head.weight
%logits : bf16[4,8] = aten.linear(%u, %last)
return [%logits]
--- miss
y: expected aten.linear, found aten.addmm at %y
