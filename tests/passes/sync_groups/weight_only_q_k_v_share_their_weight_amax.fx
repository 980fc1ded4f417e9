pass: sync-groups
rewrites: 1
--- before
%x : bf16[1,4,32] = placeholder()
%q : bf16[32,32] = @self_attn.q_proj.weight
%q_amax : f32[] = fxq.amax(%q)
%q_q : bf16[32,32] = fxq.quantize(%q, %q_amax, format='nvfp4', scale='max')
%q_out : bf16[1,4,32] = aten.linear(%x, %q_q)
%q_view : bf16[1,4,2,16] = aten.view(%q_out, [1, 4, 2, 16])
%q_heads : bf16[1,2,4,16] = aten.transpose.int(%q_view, 1, 2)
%k : bf16[32,32] = @self_attn.k_proj.weight
%k_amax : f32[] = fxq.amax(%k)
%k_q : bf16[32,32] = fxq.quantize(%k, %k_amax, format='nvfp4', scale='max')
%k_out : bf16[1,4,32] = aten.linear(%x, %k_q)
%k_view : bf16[1,4,2,16] = aten.view(%k_out, [1, 4, 2, 16])
%k_heads : bf16[1,2,4,16] = aten.transpose.int(%k_view, 1, 2)
%v : bf16[32,32] = @self_attn.v_proj.weight
%v_amax : f32[] = fxq.amax(%v)
%v_q : bf16[32,32] = fxq.quantize(%v, %v_amax, format='nvfp4', scale='max')
%v_out : bf16[1,4,32] = aten.linear(%x, %v_q)
%v_view : bf16[1,4,2,16] = aten.view(%v_out, [1, 4, 2, 16])
%v_heads : bf16[1,2,4,16] = aten.transpose.int(%v_view, 1, 2)
%attention : bf16[1,2,4,16] = aten.scaled_dot_product_attention(%q_heads, %k_heads, %v_heads)
%heads : bf16[1,4,2,16] = aten.transpose.int(%attention, 1, 2)
%merged : bf16[1,4,32] = aten.reshape(%heads, [1, 4, 32])
%o : bf16[32,32] = @self_attn.o_proj.weight
%o_amax : f32[] = fxq.amax(%o)
%o_q : bf16[32,32] = fxq.quantize(%o, %o_amax, format='nvfp4', scale='max')
%y : bf16[1,4,32] = aten.linear(%merged, %o_q)
%last : bf16[8,32] = @lm_head.weight
%logits : bf16[1,4,8] = aten.linear(%y, %last)
return [%logits]
--- after
%x : bf16[1,4,32] = placeholder()
%q : bf16[32,32] = @self_attn.q_proj.weight
%q_amax : f32[] = fxq.amax(%q)
%k : bf16[32,32] = @self_attn.k_proj.weight
%k_amax : f32[] = fxq.amax(%k)
%v : bf16[32,32] = @self_attn.v_proj.weight
%v_amax : f32[] = fxq.amax(%v)
%q_group_amax : f32[] = fxq.sync([%q_amax, %k_amax, %v_amax])
%q_q : bf16[32,32] = fxq.quantize(%q, %q_group_amax, format='nvfp4', scale='max')
%q_out : bf16[1,4,32] = aten.linear(%x, %q_q)
%q_view : bf16[1,4,2,16] = aten.view(%q_out, [1, 4, 2, 16])
%q_heads : bf16[1,2,4,16] = aten.transpose.int(%q_view, 1, 2)
%k_q : bf16[32,32] = fxq.quantize(%k, %q_group_amax, format='nvfp4', scale='max')
%k_out : bf16[1,4,32] = aten.linear(%x, %k_q)
%k_view : bf16[1,4,2,16] = aten.view(%k_out, [1, 4, 2, 16])
%k_heads : bf16[1,2,4,16] = aten.transpose.int(%k_view, 1, 2)
%v_q : bf16[32,32] = fxq.quantize(%v, %q_group_amax, format='nvfp4', scale='max')
%v_out : bf16[1,4,32] = aten.linear(%x, %v_q)
%v_view : bf16[1,4,2,16] = aten.view(%v_out, [1, 4, 2, 16])
%v_heads : bf16[1,2,4,16] = aten.transpose.int(%v_view, 1, 2)
%attention : bf16[1,2,4,16] = aten.scaled_dot_product_attention(%q_heads, %k_heads, %v_heads)
%heads : bf16[1,4,2,16] = aten.transpose.int(%attention, 1, 2)
%merged : bf16[1,4,32] = aten.reshape(%heads, [1, 4, 32])
%o : bf16[32,32] = @self_attn.o_proj.weight
%o_amax : f32[] = fxq.amax(%o)
%o_q : bf16[32,32] = fxq.quantize(%o, %o_amax, format='nvfp4', scale='max')
%y : bf16[1,4,32] = aten.linear(%merged, %o_q)
%last : bf16[8,32] = @lm_head.weight
%logits : bf16[1,4,8] = aten.linear(%y, %last)
return [%logits]
