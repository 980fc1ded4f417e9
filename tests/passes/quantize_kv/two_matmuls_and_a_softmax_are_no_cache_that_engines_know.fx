pass: quantize-kv
--- before
%q : bf16[2,4,16] = placeholder()
%k : bf16[2,16,4] = placeholder()
%v : bf16[2,4,16] = placeholder()
%scores : bf16[2,4,4] = aten.bmm(%q, %k)
%soft : bf16[2,4,4] = aten.softmax.int(%scores, -1)
%y : bf16[2,4,16] = aten.bmm(%soft, %v)
return [%y]
--- error
VerifyError: quantize-kv rewrote nothing
