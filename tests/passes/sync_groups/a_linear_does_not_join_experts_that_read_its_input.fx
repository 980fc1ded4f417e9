pass: sync-groups
--- before
%x : bf16[4,32] = placeholder()
%ids : i64[4] = placeholder()
%a : bf16[16,32] = @self_attn.q_proj.weight
%a_amax : f32[] = fxq.amax(%a)
%a_q : bf16[16,32] = fxq.quantize(%a, %a_amax, format='nvfp4', scale='max')
%y : bf16[4,16] = aten.linear(%x, %a_q)
%w : bf16[2,16,32] = @experts.up_proj
%w_e0 : bf16[16,32] = fxq.slice(%w, 0)
%w_e0_amax : f32[] = fxq.amax(%w_e0)
%w_e0_q : bf16[16,32] = fxq.quantize(%w_e0, %w_e0_amax, format='nvfp4', scale='max')
%w_e1 : bf16[16,32] = fxq.slice(%w, 1)
%w_e1_amax : f32[] = fxq.amax(%w_e1)
%w_e1_q : bf16[16,32] = fxq.quantize(%w_e1, %w_e1_amax, format='nvfp4', scale='max')
%w_q : bf16[2,16,32] = fxq.stack([%w_e0_q, %w_e1_q])
%e : bf16[4,16] = fxq.expert_linear(%x, %w_q, %ids)
return [%y, %e]
--- after
%x : bf16[4,32] = placeholder()
%ids : i64[4] = placeholder()
%a : bf16[16,32] = @self_attn.q_proj.weight
%a_amax : f32[] = fxq.amax(%a)
%a_q : bf16[16,32] = fxq.quantize(%a, %a_amax, format='nvfp4', scale='max')
%y : bf16[4,16] = aten.linear(%x, %a_q)
%w : bf16[2,16,32] = @experts.up_proj
%w_e0 : bf16[16,32] = fxq.slice(%w, 0)
%w_e0_amax : f32[] = fxq.amax(%w_e0)
%w_e0_q : bf16[16,32] = fxq.quantize(%w_e0, %w_e0_amax, format='nvfp4', scale='max')
%w_e1 : bf16[16,32] = fxq.slice(%w, 1)
%w_e1_amax : f32[] = fxq.amax(%w_e1)
%w_e1_q : bf16[16,32] = fxq.quantize(%w_e1, %w_e1_amax, format='nvfp4', scale='max')
%w_q : bf16[2,16,32] = fxq.stack([%w_e0_q, %w_e1_q])
%e : bf16[4,16] = fxq.expert_linear(%x, %w_q, %ids)
return [%y, %e]
