pass: quantize-experts
--- before
%x : bf16[4,32] = placeholder()
%w : bf16[3,16,32] = @moe.input_linear.weight
%w_e0 : bf16[16,32] = fxq.slice(%w, 0)
%y0 : bf16[4,16] = aten.linear(%x, %w_e0)
%w_e2 : bf16[16,32] = fxq.slice(%w, 2)
%y2 : bf16[4,16] = aten.linear(%x, %w_e2)
return [%y0, %y2]
--- error
VerifyError: moe.input_linear.weight: the graph never reads expert 1
