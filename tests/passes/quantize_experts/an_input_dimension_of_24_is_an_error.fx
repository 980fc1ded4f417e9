pass: quantize-experts
--- before
%x : bf16[4,24] = placeholder()
%ids : i64[4] = placeholder()
%w : bf16[2,16,24] = @mlp.experts.up_proj
%y : bf16[4,16] = fxq.expert_linear(%x, %w, %ids)
return [%y]
--- error
VerifyError: mlp.experts.up_proj
24
multiple of 16
