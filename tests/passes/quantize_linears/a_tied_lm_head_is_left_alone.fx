pass: quantize-linears
rewrites: 1
--- before
%ids : i64[4] = placeholder()
%table : bf16[8,32] = @embed_tokens.weight
%x : bf16[4,32] = aten.embedding(%table, %ids)
%w : bf16[32,32] = @up_proj.weight
%y : bf16[4,32] = aten.linear(%x, %w)
%logits : bf16[4,8] = aten.linear(%y, %table)
return [%logits]
--- after
%ids : i64[4] = placeholder()
%table : bf16[8,32] = @embed_tokens.weight
%x : bf16[4,32] = aten.embedding(%table, %ids)
%w_input_amax : f32[] = fxq.amax(%x)
%w_input_q : bf16[4,32] = fxq.quantize(%x, %w_input_amax, format='nvfp4', scale='dynamic')
%w : bf16[32,32] = @up_proj.weight
%w_amax : f32[] = fxq.amax(%w)
%w_q : bf16[32,32] = fxq.quantize(%w, %w_amax, format='nvfp4', scale='max')
%y : bf16[4,32] = aten.linear(%w_input_q, %w_q)
%logits : bf16[4,8] = aten.linear(%y, %table)
return [%logits]
--- miss
logits: the output head
