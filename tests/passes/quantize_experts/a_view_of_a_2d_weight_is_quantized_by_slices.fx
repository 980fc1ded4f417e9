pass: quantize-experts
rewrites: 2
--- before
%x : bf16[4,32] = placeholder()
%ids : i64[4] = placeholder()
%w : bf16[32,32] = @ffn.experts.mlp.w1
%w_3d : bf16[2,16,32] = aten.view(%w, [2, 16, 32])
%y : bf16[4,16] = fxq.expert_linear(%x, %w_3d, %ids)
return [%y]
--- after
%x : bf16[4,32] = placeholder()
%ids : i64[4] = placeholder()
%w : bf16[32,32] = @ffn.experts.mlp.w1
%w_3d : bf16[2,16,32] = aten.view(%w, [2, 16, 32])
%w_3d_input_amax : f32[] = fxq.amax(%x)
%w_3d_input_q : bf16[4,32] = fxq.quantize(%x, %w_3d_input_amax, format='nvfp4', scale='dynamic')
%w_3d_e0 : bf16[16,32] = fxq.slice(%w_3d, 0)
%w_3d_e0_amax : f32[] = fxq.amax(%w_3d_e0)
%w_3d_e0_q : bf16[16,32] = fxq.quantize(%w_3d_e0, %w_3d_e0_amax, format='nvfp4', scale='max')
%w_3d_e1 : bf16[16,32] = fxq.slice(%w_3d, 1)
%w_3d_e1_amax : f32[] = fxq.amax(%w_3d_e1)
%w_3d_e1_q : bf16[16,32] = fxq.quantize(%w_3d_e1, %w_3d_e1_amax, format='nvfp4', scale='max')
%w_3d_q : bf16[2,16,32] = fxq.stack([%w_3d_e0_q, %w_3d_e1_q])
%y : bf16[4,16] = fxq.expert_linear(%w_3d_input_q, %w_3d_q, %ids)
return [%y]
