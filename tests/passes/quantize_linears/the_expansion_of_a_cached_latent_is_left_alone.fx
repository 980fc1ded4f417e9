pass: quantize-linears
rewrites: 3
--- before
%x : bf16[1,4,32] = placeholder()
%q_a : bf16[16,32] = @self_attn.q_a_proj.weight
%q_low : bf16[1,4,16] = aten.linear(%x, %q_a)
%q_norm : bf16[16] = @self_attn.q_a_layernorm.weight
%q_normed : bf16[1,4,16] = aten.mul.Tensor(%q_low, %q_norm)
%q_b : bf16[32,16] = @self_attn.q_b_proj.weight
%q_out : bf16[1,4,32] = aten.linear(%q_normed, %q_b)
%q_view : bf16[1,4,1,32] = aten.view(%q_out, [1, 4, 1, 32])
%q_heads : bf16[1,1,4,32] = aten.transpose.int(%q_view, 1, 2)
%kv_a : bf16[32,32] = @self_attn.kv_a_proj_with_mqa.weight
%kv_low : bf16[1,4,32] = aten.linear(%x, %kv_a)
%parts : [bf16[1,4,16], bf16[1,4,16]] = aten.split_with_sizes(%kv_low, [16, 16], -1)
%latent : bf16[1,4,16] = operator.getitem(%parts, 0)
%k_rope : bf16[1,4,16] = operator.getitem(%parts, 1)
%kv_b : bf16[48,16] = @self_attn.kv_b_proj.weight
%kv : bf16[1,4,48] = aten.linear(%latent, %kv_b)
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
--- miss
kv: the expansion of a cached latent: engines absorb it
--- after
%x : bf16[1,4,32] = placeholder()
%q_a_input_amax : f32[] = fxq.amax(%x)
%q_a_input_q : bf16[1,4,32] = fxq.quantize(%x, %q_a_input_amax, format='nvfp4', scale='dynamic')
%q_a : bf16[16,32] = @self_attn.q_a_proj.weight
%q_a_amax : f32[] = fxq.amax(%q_a)
%q_a_q : bf16[16,32] = fxq.quantize(%q_a, %q_a_amax, format='nvfp4', scale='max')
%q_low : bf16[1,4,16] = aten.linear(%q_a_input_q, %q_a_q)
%q_norm : bf16[16] = @self_attn.q_a_layernorm.weight
%q_normed : bf16[1,4,16] = aten.mul.Tensor(%q_low, %q_norm)
%q_b_input_amax : f32[] = fxq.amax(%q_normed)
%q_b_input_q : bf16[1,4,16] = fxq.quantize(%q_normed, %q_b_input_amax, format='nvfp4', scale='dynamic')
%q_b : bf16[32,16] = @self_attn.q_b_proj.weight
%q_b_amax : f32[] = fxq.amax(%q_b)
%q_b_q : bf16[32,16] = fxq.quantize(%q_b, %q_b_amax, format='nvfp4', scale='max')
%q_out : bf16[1,4,32] = aten.linear(%q_b_input_q, %q_b_q)
%q_view : bf16[1,4,1,32] = aten.view(%q_out, [1, 4, 1, 32])
%q_heads : bf16[1,1,4,32] = aten.transpose.int(%q_view, 1, 2)
%kv_a : bf16[32,32] = @self_attn.kv_a_proj_with_mqa.weight
%kv_a_amax : f32[] = fxq.amax(%kv_a)
%kv_a_q : bf16[32,32] = fxq.quantize(%kv_a, %kv_a_amax, format='nvfp4', scale='max')
%kv_low : bf16[1,4,32] = aten.linear(%q_a_input_q, %kv_a_q)
%parts : [bf16[1,4,16], bf16[1,4,16]] = aten.split_with_sizes(%kv_low, [16, 16], -1)
%latent : bf16[1,4,16] = operator.getitem(%parts, 0)
%k_rope : bf16[1,4,16] = operator.getitem(%parts, 1)
%kv_b : bf16[48,16] = @self_attn.kv_b_proj.weight
%kv : bf16[1,4,48] = aten.linear(%latent, %kv_b)
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
