pass: quantize-experts
options: {weights: fp8, inputs: fp8}
rewrites: 2
--- before
%x : bf16[4,32] = placeholder()
%ids : i64[4] = placeholder()
%w : bf16[2,16,32] = @mlp.experts.up_proj
%y : bf16[4,16] = fxq.expert_linear(%x, %w, %ids)
return [%y]
--- after
%x : bf16[4,32] = placeholder()
%ids : i64[4] = placeholder()
%w_input_amax : f32[] = fxq.amax(%x)
%w_input_q : bf16[4,32] = fxq.quantize(%x, %w_input_amax, format='fp8', scale='static')
%w : bf16[2,16,32] = @mlp.experts.up_proj
%w_e0 : bf16[16,32] = fxq.slice(%w, 0)
%w_e0_amax : f32[] = fxq.amax(%w_e0)
%w_e0_q : bf16[16,32] = fxq.quantize(%w_e0, %w_e0_amax, format='fp8', scale='max')
%w_e1 : bf16[16,32] = fxq.slice(%w, 1)
%w_e1_amax : f32[] = fxq.amax(%w_e1)
%w_e1_q : bf16[16,32] = fxq.quantize(%w_e1, %w_e1_amax, format='fp8', scale='max')
%w_q : bf16[2,16,32] = fxq.stack([%w_e0_q, %w_e1_q])
%y : bf16[4,16] = fxq.expert_linear(%w_input_q, %w_q, %ids)
return [%y]
