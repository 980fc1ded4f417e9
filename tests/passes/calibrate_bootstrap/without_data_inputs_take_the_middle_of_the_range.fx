pass: calibrate-bootstrap
rewrites: 1
--- before
%ids : i64[1,4] = placeholder()
%table : bf16[4,16] = @embed.weight
%x : bf16[1,4,16] = aten.embedding(%table, %ids)
%a_input_amax : f32[] = fxq.amax(%x)
%a_input_q : bf16[1,4,16] = fxq.quantize(%x, %a_input_amax, format='nvfp4', scale='dynamic')
%a : bf16[16,16] = @a.weight
%a_amax : f32[] = fxq.amax(%a)
%a_q : bf16[16,16] = fxq.quantize(%a, %a_amax, format='nvfp4', scale='max')
%y : bf16[1,4,16] = aten.linear(%a_input_q, %a_q)
%last : bf16[8,16] = @lm_head.weight
%logits : bf16[1,4,8] = aten.linear(%y, %last)
return [%logits]
--- after
%ids : i64[1,4] = placeholder()
%table : bf16[4,16] = @embed.weight
%x : bf16[1,4,16] = aten.embedding(%table, %ids)
%a_input_amax : f32[] = fxq.amax(%x)
%a_input_amax_unseen : f32[] = aten.scalar_tensor(448.0, dtype=torch.float32)
%a_input_amax_or : f32[] = fxq.first([%a_input_amax, %a_input_amax_unseen])
%a_input_q : bf16[1,4,16] = fxq.quantize(%x, %a_input_amax_or, format='nvfp4', scale='dynamic')
%a : bf16[16,16] = @a.weight
%a_amax : f32[] = fxq.amax(%a)
%a_q : bf16[16,16] = fxq.quantize(%a, %a_amax, format='nvfp4', scale='max')
%y : bf16[1,4,16] = aten.linear(%a_input_q, %a_q)
%last : bf16[8,16] = @lm_head.weight
%logits : bf16[1,4,8] = aten.linear(%y, %last)
return [%logits]
