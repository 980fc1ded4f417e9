pass: quantize-experts
options: {required: false}
--- before
%x : bf16[4,32] = placeholder()
%a : bf16[16,32] = @layers.0.moe.experts.0.w.weight
%b : bf16[16,32] = @layers.0.moe.experts.1.w.weight
%z : [bf16[4,32]] = fxq.opaque('module:layers.0.moe', [%a, %b, %x], [], arguments='{"call": {}, "results": [{"shape": ["2.0", 32], "dtype": "bfloat16"}]}')
%z0 : bf16[4,32] = operator.getitem(%z, 0)
return [%z0]
--- error
VerifyError: layers.0.moe.experts.0.w.weight: it is one of a list inside the opaque call module:layers.0.moe
1 more weight
