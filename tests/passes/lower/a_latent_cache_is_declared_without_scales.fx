pass: lower
--- before
%x : bf16[1,4,32] = placeholder()
%q_a : bf16[16,32] = @self_attn.q_a_proj.weight
%q_a_amax : f32[] = fxq.amax(%q_a)
%kv_a : bf16[32,32] = @self_attn.kv_a_proj_with_mqa.weight
%kv_a_amax : f32[] = fxq.amax(%kv_a)
%q_a_group_amax : f32[] = fxq.sync([%q_a_amax, %kv_a_amax])
%q_a_q : bf16[16,32] = fxq.quantize(%q_a, %q_a_group_amax, format='nvfp4', scale='max')
%q_low : bf16[1,4,16] = aten.linear(%x, %q_a_q)
%q_norm : bf16[16] = @self_attn.q_a_layernorm.weight
%q_normed : bf16[1,4,16] = aten.mul.Tensor(%q_low, %q_norm)
%q_b : bf16[32,16] = @self_attn.q_b_proj.weight
%q_b_amax : f32[] = fxq.amax(%q_b)
%q_b_q : bf16[32,16] = fxq.quantize(%q_b, %q_b_amax, format='nvfp4', scale='max')
%q_out : bf16[1,4,32] = aten.linear(%q_normed, %q_b_q)
%q_view : bf16[1,4,1,32] = aten.view(%q_out, [1, 4, 1, 32])
%q_heads : bf16[1,1,4,32] = aten.transpose.int(%q_view, 1, 2)
%kv_a_q : bf16[32,32] = fxq.quantize(%kv_a, %q_a_group_amax, format='nvfp4', scale='max')
%kv_low : bf16[1,4,32] = aten.linear(%x, %kv_a_q)
%parts : [bf16[1,4,16], bf16[1,4,16]] = aten.split_with_sizes(%kv_low, [16, 16], -1)
%latent : bf16[1,4,16] = operator.getitem(%parts, 0)
%k_rope : bf16[1,4,16] = operator.getitem(%parts, 1)
%kv_b : bf16[48,16] = @self_attn.kv_b_proj.weight
%kv_b_amax : f32[] = fxq.amax(%kv_b)
%kv_b_q : bf16[48,16] = fxq.quantize(%kv_b, %kv_b_amax, format='nvfp4', scale='max')
%attention_latent_amax : f32[] = aten.scalar_tensor(448.0, dtype=torch.float32)
%attention_latent_q : bf16[1,4,16] = fxq.quantize(%latent, %attention_latent_amax, format='fp8', scale='max')
%kv : bf16[1,4,48] = aten.linear(%attention_latent_q, %kv_b_q)
%kv_parts : [bf16[1,4,16], bf16[1,4,32]] = aten.split_with_sizes(%kv, [16, 32], -1)
%k_nope : bf16[1,4,16] = operator.getitem(%kv_parts, 0)
%v_out : bf16[1,4,32] = operator.getitem(%kv_parts, 1)
%k_out : bf16[1,4,32] = aten.cat([%k_nope, %k_rope], -1)
%k_view : bf16[1,4,1,32] = aten.view(%k_out, [1, 4, 1, 32])
%k_heads : bf16[1,1,4,32] = aten.transpose.int(%k_view, 1, 2)
%v_view : bf16[1,4,1,32] = aten.view(%v_out, [1, 4, 1, 32])
%v_heads : bf16[1,1,4,32] = aten.transpose.int(%v_view, 1, 2)
%attention : bf16[1,1,4,32] = aten.scaled_dot_product_attention(%q_heads, %k_heads, %v_heads)
%heads : bf16[1,4,1,32] = aten.transpose.int(%attention, 1, 2)
%merged : bf16[1,4,32] = aten.reshape(%heads, [1, 4, 32])
%last : bf16[8,32] = @lm_head.weight
%logits : bf16[1,4,8] = aten.linear(%merged, %last)
return [%logits]
--- after
%q_a : bf16[16,32] = @self_attn.q_a_proj.weight
%q_a_amax : f32[] = fxq.amax(%q_a)
%kv_a : bf16[32,32] = @self_attn.kv_a_proj_with_mqa.weight
%kv_a_amax : f32[] = fxq.amax(%kv_a)
%q_a_group_amax : f32[] = fxq.sync([%q_a_amax, %kv_a_amax])
%q_a_packed : [u8[16,16], f8e4m3[16,2], f32[]] = fxq.pack(%q_a, %q_a_group_amax, format='nvfp4', scale='max')
%q_a_packed_0 : none = fxq.store_linear('self_attn.q_a_proj', %q_a_packed, None, start=0, end=16)
%q_b : bf16[32,16] = @self_attn.q_b_proj.weight
%q_b_amax : f32[] = fxq.amax(%q_b)
%q_b_packed : [u8[32,8], f8e4m3[32,1], f32[]] = fxq.pack(%q_b, %q_b_amax, format='nvfp4', scale='max')
%q_b_packed_0 : none = fxq.store_linear('self_attn.q_b_proj', %q_b_packed, None, start=0, end=32)
%kv_a_packed : [u8[32,16], f8e4m3[32,2], f32[]] = fxq.pack(%kv_a, %q_a_group_amax, format='nvfp4', scale='max')
%kv_a_packed_0 : none = fxq.store_linear('self_attn.kv_a_proj_with_mqa', %kv_a_packed, None, start=0, end=32)
%kv_b : bf16[48,16] = @self_attn.kv_b_proj.weight
%kv_b_amax : f32[] = fxq.amax(%kv_b)
%kv_b_packed : [u8[48,8], f8e4m3[48,1], f32[]] = fxq.pack(%kv_b, %kv_b_amax, format='nvfp4', scale='max')
%kv_b_packed_0 : none = fxq.store_linear('self_attn.kv_b_proj', %kv_b_packed, None, start=0, end=48)
%attention_kv : none = fxq.store_kv('self_attn', None, None, format='fp8')
%self_attn_q_a_layernorm_weight_ : bf16[16] = fxq.load('self_attn.q_a_layernorm.weight', shape=[16], dtype=torch.bfloat16)
%self_attn_q_a_layernorm_weight_store : none = fxq.store('self_attn.q_a_layernorm.weight', %self_attn_q_a_layernorm_weight_)
%lm_head_weight_ : bf16[8,32] = fxq.load('lm_head.weight', shape=[8, 32], dtype=torch.bfloat16)
%lm_head_weight_store : none = fxq.store('lm_head.weight', %lm_head_weight_)
return ()
