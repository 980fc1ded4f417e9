pass: quantize-experts
options: {inputs: none, skip_last: 1}
--- before
%x : bf16[4,32] = placeholder()
%ids : i64[4] = placeholder()
%a : bf16[2,32,32] = @layers.0.up.weight
%b : bf16[4,32] = fxq.expert_linear(%x, %a, %ids)
%c : bf16[2,32,32] = @layers.1.up.weight
%d : bf16[4,32] = fxq.expert_linear(%b, %c, %ids)
return [%d]
--- after
%x : bf16[4,32] = placeholder()
%ids : i64[4] = placeholder()
%a : bf16[2,32,32] = @layers.0.up.weight
%a_e0 : bf16[32,32] = fxq.slice(%a, 0)
%a_e0_amax : f32[] = fxq.amax(%a_e0)
%a_e0_q : bf16[32,32] = fxq.quantize(%a_e0, %a_e0_amax, format='nvfp4', scale='max')
%a_e1 : bf16[32,32] = fxq.slice(%a, 1)
%a_e1_amax : f32[] = fxq.amax(%a_e1)
%a_e1_q : bf16[32,32] = fxq.quantize(%a_e1, %a_e1_amax, format='nvfp4', scale='max')
%a_q : bf16[2,32,32] = fxq.stack([%a_e0_q, %a_e1_q])
%b : bf16[4,32] = fxq.expert_linear(%x, %a_q, %ids)
%c : bf16[2,32,32] = @layers.1.up.weight
%d : bf16[4,32] = fxq.expert_linear(%b, %c, %ids)
return [%d]
--- miss
d: in the last 1 of 2 layers
