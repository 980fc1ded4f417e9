pass: quantize-experts
options: {partial: true, required: false}
rewrites: 0
hub:
  tensors:
    mlp.experts.0.up_proj.weight: bf16[16,32]
    mlp.experts.1.up_proj.weight: bf16[16,32]
    mlp.experts.2.up_proj.weight: bf16[16,32]
    mlp.experts.3.up_proj.weight: bf16[16,32]
  stored:
    mlp.text.up_proj:
      keys: [[mlp.experts.0.up_proj.weight, mlp.experts.1.up_proj.weight]]
      stacked: true
    mlp.vision.up_proj:
      keys: [[mlp.experts.2.up_proj.weight, mlp.experts.3.up_proj.weight]]
      stacked: true
--- before
%x : bf16[4,32] = placeholder()
%ids : i64[4] = placeholder()
%w : bf16[2,16,32] = @mlp.text.up_proj
%y : bf16[4,16] = fxq.expert_linear(%x, %w, %ids)
return [%y]
--- after
%x : bf16[4,32] = placeholder()
%ids : i64[4] = placeholder()
%w : bf16[2,16,32] = @mlp.text.up_proj
%y : bf16[4,16] = fxq.expert_linear(%x, %w, %ids)
return [%y]
