pass: quantize-linears
--- before
%x : bf16[1,4,32] = placeholder()
%q : bf16[32,32] = @self_attn.q_proj.weight
%q_amax : f32[] = fxq.amax(%q)
%q_q : bf16[32,32] = fxq.quantize(%q, %q_amax, format='fp8', scale='max')
%q_input_amax : f32[] = fxq.amax(%x)
%q_input_q : bf16[1,4,32] = fxq.quantize(%x, %q_input_amax, format='fp8', scale='static')
%q_out : bf16[1,4,32] = aten.linear(%q_input_q, %q_q)
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
%attention : bf16[1,2,4,16] = aten.scaled_dot_product_attention(%q_heads, %k_heads, %v_heads)
%heads : bf16[1,4,2,16] = aten.transpose.int(%attention, 1, 2)
%merged : bf16[1,4,32] = aten.reshape(%heads, [1, 4, 32])
%o : bf16[32,32] = @self_attn.o_proj.weight
%y : bf16[1,4,32] = aten.linear(%merged, %o)
%last : bf16[8,32] = @lm_head.weight
%logits : bf16[1,4,8] = aten.linear(%y, %last)
return [%logits]
--- error
VerifyError: engines fuse q/k/v, so all must be quantized alike
self_attn.q_proj.weight fp8 with inputs fp8 and self_attn.k_proj.weight, self_attn.v_proj.weight nvfp4 with inputs nvfp4
