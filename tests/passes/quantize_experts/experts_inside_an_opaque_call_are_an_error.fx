pass: quantize-experts
hub:
  tensors:
    a.experts.up_proj: bf16[2,16,32]
    b.experts.up_proj: bf16[2,16,32]
  stored:
    a.experts.up_proj: {keys: [[a.experts.up_proj]]}
    b.experts.up_proj: {keys: [[b.experts.up_proj]]}
--- before
%x : bf16[4,32] = placeholder()
%ids : i64[4] = placeholder()
%a : bf16[2,16,32] = @a.experts.up_proj
%y : bf16[4,16] = fxq.expert_linear(%x, %a, %ids)
%b : bf16[2,16,32] = @b.experts.up_proj
%z : [bf16[4,32]] = fxq.opaque('module:b', [%x, %b], [], arguments='{"call": {}, "results": [{"shape": ["0.0", 32], "dtype": "bfloat16"}]}')
%z0 : bf16[4,32] = operator.getitem(%z, 0)
return [%y, %z0]
--- error
VerifyError: b.experts.up_proj: these experts lie inside the opaque call module:b
