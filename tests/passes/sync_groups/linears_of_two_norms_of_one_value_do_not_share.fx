pass: sync-groups
rewrites: 0
--- before
%x : bf16[4,32] = placeholder()
%n1 : bf16[32] = @input_layernorm.weight
%x1 : bf16[4,32] = aten.mul.Tensor(%x, %n1)
%a_input_amax : f32[] = fxq.amax(%x1)
%a_input_q : bf16[4,32] = fxq.quantize(%x1, %a_input_amax, format='nvfp4', scale='dynamic')
%a : bf16[16,32] = @self_attn.o_proj.weight
%a_amax : f32[] = fxq.amax(%a)
%a_q : bf16[16,32] = fxq.quantize(%a, %a_amax, format='nvfp4', scale='max')
%y : bf16[4,16] = aten.linear(%a_input_q, %a_q)
%n2 : bf16[32] = @post_attention_layernorm.weight
%x2 : bf16[4,32] = aten.mul.Tensor(%x, %n2)
%b_input_amax : f32[] = fxq.amax(%x2)
%b_input_q : bf16[4,32] = fxq.quantize(%x2, %b_input_amax, format='nvfp4', scale='dynamic')
%b : bf16[16,32] = @mlp.up_proj.weight
%b_amax : f32[] = fxq.amax(%b)
%b_q : bf16[16,32] = fxq.quantize(%b, %b_amax, format='nvfp4', scale='max')
%z : bf16[4,16] = aten.linear(%b_input_q, %b_q)
return [%y, %z]
--- after
%x : bf16[4,32] = placeholder()
%n1 : bf16[32] = @input_layernorm.weight
%x1 : bf16[4,32] = aten.mul.Tensor(%x, %n1)
%a_input_amax : f32[] = fxq.amax(%x1)
%a_input_q : bf16[4,32] = fxq.quantize(%x1, %a_input_amax, format='nvfp4', scale='dynamic')
%a : bf16[16,32] = @self_attn.o_proj.weight
%a_amax : f32[] = fxq.amax(%a)
%a_q : bf16[16,32] = fxq.quantize(%a, %a_amax, format='nvfp4', scale='max')
%y : bf16[4,16] = aten.linear(%a_input_q, %a_q)
%n2 : bf16[32] = @post_attention_layernorm.weight
%x2 : bf16[4,32] = aten.mul.Tensor(%x, %n2)
%b_input_amax : f32[] = fxq.amax(%x2)
%b_input_q : bf16[4,32] = fxq.quantize(%x2, %b_input_amax, format='nvfp4', scale='dynamic')
%b : bf16[16,32] = @mlp.up_proj.weight
%b_amax : f32[] = fxq.amax(%b)
%b_q : bf16[16,32] = fxq.quantize(%b, %b_amax, format='nvfp4', scale='max')
%z : bf16[4,16] = aten.linear(%b_input_q, %b_q)
return [%y, %z]
