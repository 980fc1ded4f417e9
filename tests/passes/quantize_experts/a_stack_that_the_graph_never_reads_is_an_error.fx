pass: quantize-experts
hub:
  tensors:
    mlp.gate.weight: bf16[2,32]
    mlp.experts.up_proj: bf16[2,16,32]
    mlp.experts.down_proj: bf16[2,32,16]
  stored:
    mlp.gate.weight: {keys: [[mlp.gate.weight]]}
    mlp.experts.up_proj: {keys: [[mlp.experts.up_proj]]}
    mlp.experts.down_proj: {keys: [[mlp.experts.down_proj]]}
--- before
%x : bf16[4,32] = placeholder()
%gate : bf16[2,32] = @mlp.gate.weight
%logits : bf16[4,2] = aten.linear(%x, %gate)
%ids : i64[4] = aten.argmax(%logits, -1)
%w : bf16[2,16,32] = @mlp.experts.up_proj
%y : bf16[4,16] = fxq.expert_linear(%x, %w, %ids)
return [%y]
--- error
VerifyError: mlp.experts.down_proj: the graph never reads these experts
--allow-partial
