pass: quantize-kv
--- before
%x : bf16[6,16] = placeholder()
%router : bf16[4,16] = @router
%logits : bf16[6,4] = aten.linear(%x, %router)
%soft : bf16[6,4] = aten.softmax.int(%logits, -1)
%w : bf16[4,16] = @w
%y : bf16[6,16] = aten.matmul(%soft, %w)
return [%y]
--- error
VerifyError: quantize-kv rewrote nothing
%soft: what it weighs is no product of two activations
