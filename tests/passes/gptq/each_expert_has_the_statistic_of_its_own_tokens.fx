pass: gptq
rewrites: 1
--- before
%x : bf16[4,32] = placeholder()
%ids : i64[4] = placeholder()
%x_amax : f32[] = fxq.amax(%x)
%x_q : bf16[4,32] = fxq.quantize(%x, %x_amax, format='nvfp4', scale='dynamic')
%w : bf16[2,16,32] = @experts.up_proj
%w_e0 : bf16[16,32] = fxq.slice(%w, 0)
%w_e0_amax : f32[] = fxq.amax(%w_e0)
%w_e0_q : bf16[16,32] = fxq.quantize(%w_e0, %w_e0_amax, format='nvfp4', scale='max')
%w_e1 : bf16[16,32] = fxq.slice(%w, 1)
%w_e1_amax : f32[] = fxq.amax(%w_e1)
%w_e1_q : bf16[16,32] = fxq.quantize(%w_e1, %w_e1_amax, format='nvfp4', scale='max')
%w_q : bf16[2,16,32] = fxq.stack([%w_e0_q, %w_e1_q])
%y : bf16[4,16] = fxq.expert_linear(%x_q, %w_q, %ids)
return [%y]
--- after
%x : bf16[4,32] = placeholder()
%ids : i64[4] = placeholder()
%x_amax : f32[] = fxq.amax(%x)
%x_q : bf16[4,32] = fxq.quantize(%x, %x_amax, format='nvfp4', scale='dynamic')
%w : bf16[2,16,32] = @experts.up_proj
%w_e0 : bf16[16,32] = fxq.slice(%w, 0)
%w_e0_amax : f32[] = fxq.amax(%w_e0)
%x_q_expert_gram : f32[2,32,32] = fxq.expert_gram(%x_q, %ids, experts=2)
%ids_tokens : i64[2] = fxq.expert_tokens(%ids, experts=2)
%x_q_expert_gram_shrunk : f32[2,32,32] = fxq.shrunk(%x_q_expert_gram, %ids_tokens, by=64)
%x_q_expert_gram_shrunk_e0 : f32[32,32] = fxq.slice(%x_q_expert_gram_shrunk, 0)
%w_e0_q : bf16[16,32] = fxq.gptq(%w_e0, %w_e0_amax, %x_q_expert_gram_shrunk_e0, format='nvfp4', damp=0.01, order='blocks', sweeps=2)
%w_e1 : bf16[16,32] = fxq.slice(%w, 1)
%w_e1_amax : f32[] = fxq.amax(%w_e1)
%x_q_expert_gram_shrunk_e1 : f32[32,32] = fxq.slice(%x_q_expert_gram_shrunk, 1)
%w_e1_q : bf16[16,32] = fxq.gptq(%w_e1, %w_e1_amax, %x_q_expert_gram_shrunk_e1, format='nvfp4', damp=0.01, order='blocks', sweeps=2)
%w_q : bf16[2,16,32] = fxq.stack([%w_e0_q, %w_e1_q])
%y : bf16[4,16] = fxq.expert_linear(%x_q, %w_q, %ids)
return [%y]
