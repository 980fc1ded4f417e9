pass: calibrate-bootstrap
rewrites: 1
values: {w_input_amax: 2.0}
--- before
%ids : i64[1,4] = placeholder()
%table : bf16[3,16] = @embed.weight
%x : bf16[1,4,16] = aten.embedding(%table, %ids)
%tokens : bf16[4,16] = aten.view(%x, [4, 16])
%which : i64[4] = aten.view(%ids, [4])
%w_input_amax : f32[] = fxq.amax(%tokens)
%w_input_q : bf16[4,16] = fxq.quantize(%tokens, %w_input_amax, format='nvfp4', scale='dynamic')
%w : bf16[3,16,16] = @experts.up_proj
%w_e0 : bf16[16,16] = fxq.slice(%w, 0)
%w_e0_amax : f32[] = fxq.amax(%w_e0)
%w_e0_q : bf16[16,16] = fxq.quantize(%w_e0, %w_e0_amax, format='nvfp4', scale='max')
%w_e1 : bf16[16,16] = fxq.slice(%w, 1)
%w_e1_amax : f32[] = fxq.amax(%w_e1)
%w_e1_q : bf16[16,16] = fxq.quantize(%w_e1, %w_e1_amax, format='nvfp4', scale='max')
%w_e2 : bf16[16,16] = fxq.slice(%w, 2)
%w_e2_amax : f32[] = fxq.amax(%w_e2)
%w_e2_q : bf16[16,16] = fxq.quantize(%w_e2, %w_e2_amax, format='nvfp4', scale='max')
%w_q : bf16[3,16,16] = fxq.stack([%w_e0_q, %w_e1_q, %w_e2_q])
%y : bf16[4,16] = fxq.expert_linear(%w_input_q, %w_q, %which)
return [%y]
--- after
%ids : i64[1,4] = placeholder()
%table : bf16[3,16] = @embed.weight
%x : bf16[1,4,16] = aten.embedding(%table, %ids)
%tokens : bf16[4,16] = aten.view(%x, [4, 16])
%which : i64[4] = aten.view(%ids, [4])
%w_input_amax : f32[] = fxq.amax(%tokens)  # = 2
%w_input_amax_unseen : f32[] = aten.scalar_tensor(448.0, dtype=torch.float32)
%w_input_amax_or : f32[] = fxq.first([%w_input_amax, %w_input_amax_unseen])
%w_input_q : bf16[4,16] = fxq.quantize(%tokens, %w_input_amax_or, format='nvfp4', scale='dynamic')
%w : bf16[3,16,16] = @experts.up_proj
%w_e0 : bf16[16,16] = fxq.slice(%w, 0)
%w_e0_amax : f32[] = fxq.amax(%w_e0)
%w_e0_q : bf16[16,16] = fxq.quantize(%w_e0, %w_e0_amax, format='nvfp4', scale='max')
%w_e1 : bf16[16,16] = fxq.slice(%w, 1)
%w_e1_amax : f32[] = fxq.amax(%w_e1)
%w_e1_q : bf16[16,16] = fxq.quantize(%w_e1, %w_e1_amax, format='nvfp4', scale='max')
%w_e2 : bf16[16,16] = fxq.slice(%w, 2)
%w_e2_amax : f32[] = fxq.amax(%w_e2)
%w_e2_q : bf16[16,16] = fxq.quantize(%w_e2, %w_e2_amax, format='nvfp4', scale='max')
%w_q : bf16[3,16,16] = fxq.stack([%w_e0_q, %w_e1_q, %w_e2_q])
%y : bf16[4,16] = fxq.expert_linear(%w_input_q, %w_q, %which)
return [%y]
