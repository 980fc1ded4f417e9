pass: quantize-experts
options: {partial: true}
rewrites: 2
--- before
%x : bf16[4,32] = placeholder()
%ids : i64[4] = placeholder()
%w : bf16[2,24,32] = @layers.0.mlp.experts.up_proj
%h : bf16[4,24] = fxq.expert_linear(%x, %w, %ids)
%act : bf16[4,24] = aten.silu(%h)
%down : bf16[2,32,24] = @layers.0.mlp.experts.down_proj
%y : bf16[4,32] = fxq.expert_linear(%act, %down, %ids)
%o_proj : bf16[32,32] = @layers.1.self_attn.o_proj.weight
%o : bf16[4,32] = aten.linear(%x, %o_proj)
%both : bf16[4,32] = aten.add.Tensor(%o, %y)
%w1 : bf16[2,32,32] = @layers.1.mlp.experts.up_proj
%z : bf16[4,32] = fxq.expert_linear(%both, %w1, %ids)
return [%z]
--- after
%x : bf16[4,32] = placeholder()
%ids : i64[4] = placeholder()
%w : bf16[2,24,32] = @layers.0.mlp.experts.up_proj
%h : bf16[4,24] = fxq.expert_linear(%x, %w, %ids)
%act : bf16[4,24] = aten.silu(%h)
%down : bf16[2,32,24] = @layers.0.mlp.experts.down_proj
%y : bf16[4,32] = fxq.expert_linear(%act, %down, %ids)
%o_proj : bf16[32,32] = @layers.1.self_attn.o_proj.weight
%o : bf16[4,32] = aten.linear(%x, %o_proj)
%both : bf16[4,32] = aten.add.Tensor(%o, %y)
%w1_input_amax : f32[] = fxq.amax(%both)
%w1_input_q : bf16[4,32] = fxq.quantize(%both, %w1_input_amax, format='nvfp4', scale='dynamic')
%w1 : bf16[2,32,32] = @layers.1.mlp.experts.up_proj
%w1_e0 : bf16[32,32] = fxq.slice(%w1, 0)
%w1_e0_amax : f32[] = fxq.amax(%w1_e0)
%w1_e0_q : bf16[32,32] = fxq.quantize(%w1_e0, %w1_e0_amax, format='nvfp4', scale='max')
%w1_e1 : bf16[32,32] = fxq.slice(%w1, 1)
%w1_e1_amax : f32[] = fxq.amax(%w1_e1)
%w1_e1_q : bf16[32,32] = fxq.quantize(%w1_e1, %w1_e1_amax, format='nvfp4', scale='max')
%w1_q : bf16[2,32,32] = fxq.stack([%w1_e0_q, %w1_e1_q])
%z : bf16[4,32] = fxq.expert_linear(%w1_input_q, %w1_q, %ids)
return [%z]
