pass: quantize-experts
rewrites: 2
--- before
%x : bf16[4,32] = placeholder()
%ids : i64[4] = placeholder()
%w : bf16[2,32,16] = @mlp.experts.up_proj
%wt : bf16[2,16,32] = aten.transpose.int(%w, 1, 2)
%y : bf16[4,16] = fxq.expert_linear(%x, %wt, %ids)
return [%y]
--- after
%x : bf16[4,32] = placeholder()
%ids : i64[4] = placeholder()
%w : bf16[2,32,16] = @mlp.experts.up_proj
%wt : bf16[2,16,32] = aten.transpose.int(%w, 1, 2)
%wt_input_amax : f32[] = fxq.amax(%x)
%wt_input_q : bf16[4,32] = fxq.quantize(%x, %wt_input_amax, format='nvfp4', scale='dynamic')
%wt_e0 : bf16[16,32] = fxq.slice(%wt, 0)
%wt_e0_amax : f32[] = fxq.amax(%wt_e0)
%wt_e0_q : bf16[16,32] = fxq.quantize(%wt_e0, %wt_e0_amax, format='nvfp4', scale='max')
%wt_e1 : bf16[16,32] = fxq.slice(%wt, 1)
%wt_e1_amax : f32[] = fxq.amax(%wt_e1)
%wt_e1_q : bf16[16,32] = fxq.quantize(%wt_e1, %wt_e1_amax, format='nvfp4', scale='max')
%wt_q : bf16[2,16,32] = fxq.stack([%wt_e0_q, %wt_e1_q])
%y : bf16[4,16] = fxq.expert_linear(%wt_input_q, %wt_q, %ids)
return [%y]
