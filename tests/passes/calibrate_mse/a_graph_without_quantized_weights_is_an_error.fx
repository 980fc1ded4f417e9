pass: calibrate-mse
--- before
%ids : i64[1,4] = placeholder()
%table : bf16[3,16] = @embed.weight
%x : bf16[1,4,16] = aten.embedding(%table, %ids)
%heads : bf16[1,1,4,16] = aten.unsqueeze(%x, 1)
%twice : bf16[1,1,4,16] = aten.mul.Tensor(%heads, 2.0)
%y_k_amax : f32[] = fxq.amax(%heads)
%y_k_q : bf16[1,1,4,16] = fxq.quantize(%heads, %y_k_amax, format='fp8', scale='max')
%y_v_amax : f32[] = fxq.amax(%twice)
%y_v_q : bf16[1,1,4,16] = fxq.quantize(%twice, %y_v_amax, format='fp8', scale='max')
%y : bf16[1,1,4,16] = aten.scaled_dot_product_attention(%heads, %y_k_q, %y_v_q)
return [%y]
--- error
VerifyError: calibrate-mse rewrote nothing: expected quantized weights in blocks
%y_k_q: its operand is an activation
