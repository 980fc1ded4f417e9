pass: lower
rewrites: 1
hub:
  tensors:
    model.language_model.layers.0.self_attn.q_proj.weight: bf16[32,32]
    model.language_model.layers.0.self_attn.k_proj.weight: bf16[32,32]
    model.language_model.layers.0.self_attn.v_proj.weight: bf16[32,32]
    model.language_model.layers.0.self_attn.o_proj.weight: bf16[32,32]
    lm_head.weight: bf16[8,32]
  stored:
    self_attn.q_proj.weight: {keys: [[model.language_model.layers.0.self_attn.q_proj.weight]]}
    self_attn.k_proj.weight: {keys: [[model.language_model.layers.0.self_attn.k_proj.weight]]}
    self_attn.v_proj.weight: {keys: [[model.language_model.layers.0.self_attn.v_proj.weight]]}
    self_attn.o_proj.weight: {keys: [[model.language_model.layers.0.self_attn.o_proj.weight]]}
--- before
%x : bf16[1,4,32] = placeholder()
%q : bf16[32,32] = @self_attn.q_proj.weight
%q_out : bf16[1,4,32] = aten.linear(%x, %q)
%q_view : bf16[1,4,2,16] = aten.view(%q_out, [1, 4, 2, 16])
%q_heads : bf16[1,2,4,16] = aten.transpose.int(%q_view, 1, 2)
%k : bf16[32,32] = @self_attn.k_proj.weight
%k_out : bf16[1,4,32] = aten.linear(%x, %k)
%k_view : bf16[1,4,2,16] = aten.view(%k_out, [1, 4, 2, 16])
%k_heads : bf16[1,2,4,16] = aten.transpose.int(%k_view, 1, 2)
%v : bf16[32,32] = @self_attn.v_proj.weight
%v_out : bf16[1,4,32] = aten.linear(%x, %v)
%v_view : bf16[1,4,2,16] = aten.view(%v_out, [1, 4, 2, 16])
%v_heads : bf16[1,2,4,16] = aten.transpose.int(%v_view, 1, 2)
%attention_k_amax : f32[] = fxq.amax(%k_heads)
%attention_k_q : bf16[1,2,4,16] = fxq.quantize(%k_heads, %attention_k_amax, format='fp8', scale='max')
%attention_v_amax : f32[] = fxq.amax(%v_heads)
%attention_v_q : bf16[1,2,4,16] = fxq.quantize(%v_heads, %attention_v_amax, format='fp8', scale='max')
%attention : bf16[1,2,4,16] = aten.scaled_dot_product_attention(%q_heads, %attention_k_q, %attention_v_q)
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
%o : bf16[32,32] = @self_attn.o_proj.weight
%o_amax : f32[] = fxq.amax(%o)
%o_packed : [u8[32,16], f8e4m3[32,2], f32[]] = fxq.pack(%o, %o_amax, format='nvfp4', scale='max')
%o_packed_0 : none = fxq.store_linear('model.language_model.layers.0.self_attn.o_proj', %o_packed, None, start=0, end=32)
%attention_k_amax : f32[] = fxq.value('attention_k_amax')
%attention_v_amax : f32[] = fxq.value('attention_v_amax')
%attention_kv : none = fxq.store_kv('model.language_model.layers.0.self_attn', %attention_k_amax, %attention_v_amax, format='fp8')
%model_language_model_layers_0_self_attn_q_proj_weight_ : bf16[32,32] = fxq.load('model.language_model.layers.0.self_attn.q_proj.weight', shape=[32, 32], dtype=torch.bfloat16)
%model_language_model_layers_0_self_attn_q_proj_weight_store : none = fxq.store('model.language_model.layers.0.self_attn.q_proj.weight', %model_language_model_layers_0_self_attn_q_proj_weight_)
%model_language_model_layers_0_self_attn_k_proj_weight_ : bf16[32,32] = fxq.load('model.language_model.layers.0.self_attn.k_proj.weight', shape=[32, 32], dtype=torch.bfloat16)
%model_language_model_layers_0_self_attn_k_proj_weight_store : none = fxq.store('model.language_model.layers.0.self_attn.k_proj.weight', %model_language_model_layers_0_self_attn_k_proj_weight_)
%model_language_model_layers_0_self_attn_v_proj_weight_ : bf16[32,32] = fxq.load('model.language_model.layers.0.self_attn.v_proj.weight', shape=[32, 32], dtype=torch.bfloat16)
%model_language_model_layers_0_self_attn_v_proj_weight_store : none = fxq.store('model.language_model.layers.0.self_attn.v_proj.weight', %model_language_model_layers_0_self_attn_v_proj_weight_)
%lm_head_weight_ : bf16[8,32] = fxq.load('lm_head.weight', shape=[8, 32], dtype=torch.bfloat16)
%lm_head_weight_store : none = fxq.store('lm_head.weight', %lm_head_weight_)
return ()
