pass: sync-groups
hub:
  tensors:
    experts.0.up_proj.weight: bf16[16,32]
    experts.1.up_proj.weight: bf16[16,32]
    experts.2.up_proj.weight: bf16[16,32]
    experts.3.up_proj.weight: bf16[16,32]
  stored:
    text.up_proj: {keys: [[experts.0.up_proj.weight, experts.1.up_proj.weight]], stacked: true}
    vision.up_proj: {keys: [[experts.2.up_proj.weight, experts.3.up_proj.weight]], stacked: true}
--- before
%x : bf16[4,32] = placeholder()
%ids : i64[4] = placeholder()
%w_input_amax : f32[] = fxq.amax(%x)
%w_input_q : bf16[4,32] = fxq.quantize(%x, %w_input_amax, format='nvfp4', scale='dynamic')
%w : bf16[2,16,32] = @text.up_proj
%w_e0 : bf16[16,32] = fxq.slice(%w, 0)
%w_e0_amax : f32[] = fxq.amax(%w_e0)
%w_e0_q : bf16[16,32] = fxq.quantize(%w_e0, %w_e0_amax, format='nvfp4', scale='max')
%w_e1 : bf16[16,32] = fxq.slice(%w, 1)
%w_e1_amax : f32[] = fxq.amax(%w_e1)
%w_e1_q : bf16[16,32] = fxq.quantize(%w_e1, %w_e1_amax, format='nvfp4', scale='max')
%w_q : bf16[2,16,32] = fxq.stack([%w_e0_q, %w_e1_q])
%y : bf16[4,16] = fxq.expert_linear(%w_input_q, %w_q, %ids)
return [%y]
--- error
VerifyError: sync-groups ensures tensors_whole
experts.*.up_proj.weight holds both text.up_proj, which is quantized, and vision.up_proj, which is not
