pass: quantize-experts
options: {stored: [MXFP4], required: false}
rewrites: 0
hub:
  encodings: {experts.up: FP8}
--- before
%x : bf16[4,32] = placeholder()
%ids : i64[4] = placeholder()
%experts_up : bf16[2,32,32] = @experts.up
%y : bf16[4,32] = fxq.expert_linear(%x, %experts_up, %ids)
return [%y]
--- miss
y: the source holds it in FP8, not in MXFP4
