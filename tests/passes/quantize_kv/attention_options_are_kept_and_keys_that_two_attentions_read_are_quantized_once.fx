pass: quantize-kv
options: {scale: cast}
rewrites: 2
--- before
%q : bf16[1,2,4,16] = placeholder()
%k : bf16[1,2,4,16] = placeholder()
%v : bf16[1,2,4,16] = placeholder()
%one : bf16[1,2,4,16] = aten.scaled_dot_product_attention(%q, %k, %v, None, 0.0, True, scale=0.25)
%two : bf16[1,2,4,16] = aten.scaled_dot_product_attention(%one, %k, %v, is_causal=True)
return [%two]
--- after
%q : bf16[1,2,4,16] = placeholder()
%k : bf16[1,2,4,16] = placeholder()
%v : bf16[1,2,4,16] = placeholder()
%one_k_amax : f32[] = aten.scalar_tensor(448.0, dtype=torch.float32)
%one_k_q : bf16[1,2,4,16] = fxq.quantize(%k, %one_k_amax, format='fp8', scale='max')
%one_v_amax : f32[] = aten.scalar_tensor(448.0, dtype=torch.float32)
%one_v_q : bf16[1,2,4,16] = fxq.quantize(%v, %one_v_amax, format='fp8', scale='max')
%one : bf16[1,2,4,16] = aten.scaled_dot_product_attention(%q, %one_k_q, %one_v_q, None, 0.0, True, scale=0.25)
%two : bf16[1,2,4,16] = aten.scaled_dot_product_attention(%one, %one_k_q, %one_v_q, is_causal=True)
return [%two]
