pass: quantize-kv
rewrites: 0
options: {scale: cast}
--- before
%q : bf16[1,2,4,16] = placeholder()
%k : bf16[1,2,4,16] = placeholder()
%amax : f32[] = aten.scalar_tensor(448.0, dtype=torch.float32)
%k_q : bf16[1,2,4,16] = fxq.quantize(%k, %amax, format='fp8', scale='max')
%v : bf16[1,2,4,16] = placeholder()
%v_q : bf16[1,2,4,16] = fxq.quantize(%v, %amax, format='fp8', scale='max')
%attention : bf16[1,2,4,16] = aten.scaled_dot_product_attention(%q, %k_q, %v_q)
return [%attention]
--- after
%q : bf16[1,2,4,16] = placeholder()
%k : bf16[1,2,4,16] = placeholder()
%amax : f32[] = aten.scalar_tensor(448.0, dtype=torch.float32)
%k_q : bf16[1,2,4,16] = fxq.quantize(%k, %amax, format='fp8', scale='max')
%v : bf16[1,2,4,16] = placeholder()
%v_q : bf16[1,2,4,16] = fxq.quantize(%v, %amax, format='fp8', scale='max')
%attention : bf16[1,2,4,16] = aten.scaled_dot_product_attention(%q, %k_q, %v_q)
return [%attention]
--- miss
attention: its keys are quantized already
