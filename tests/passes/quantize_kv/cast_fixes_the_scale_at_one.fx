pass: quantize-kv
options: {scale: cast}
rewrites: 2
--- before
%q : bf16[1,2,4,16] = placeholder()
%k : bf16[1,2,4,16] = placeholder()
%v : bf16[1,2,4,16] = placeholder()
%attention : bf16[1,2,4,16] = aten.scaled_dot_product_attention(%q, %k, %v)
return [%attention]
--- after
%q : bf16[1,2,4,16] = placeholder()
%k : bf16[1,2,4,16] = placeholder()
%v : bf16[1,2,4,16] = placeholder()
%attention_k_amax : f32[] = aten.scalar_tensor(448.0, dtype=torch.float32)
%attention_k_q : bf16[1,2,4,16] = fxq.quantize(%k, %attention_k_amax, format='fp8', scale='max')
%attention_v_amax : f32[] = aten.scalar_tensor(448.0, dtype=torch.float32)
%attention_v_q : bf16[1,2,4,16] = fxq.quantize(%v, %attention_v_amax, format='fp8', scale='max')
%attention : bf16[1,2,4,16] = aten.scaled_dot_product_attention(%q, %attention_k_q, %attention_v_q)
return [%attention]
