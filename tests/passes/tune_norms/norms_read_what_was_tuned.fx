pass: tune-norms
rewrites: 3
--- before
%x : bf16[4,32] = placeholder()
%g : bf16[32] = @norm.weight
%g_wide : f32[32] = aten._to_copy(%g, dtype=torch.float32)
%g_one : f32[32] = aten.add.Tensor(%g_wide, 1)
%h : f32[4,32] = aten.mul.Tensor(%g_one, %x)
%scale : bf16[32] = @layer_norm.weight
%shift : bf16[32] = @layer_norm.bias
%h_narrow : bf16[4,32] = aten._to_copy(%h, dtype=torch.bfloat16)
%n : bf16[4,32] = aten.layer_norm(%h_narrow, [32], %scale, %shift)
%other : bf16[32] = @gate.vector
%other_act : bf16[32] = aten.sigmoid(%other)
%y : bf16[4,32] = aten.mul.Tensor(%other_act, %n)
return [%y]
--- after
%x : bf16[4,32] = placeholder()
%g_tuned : bf16[32] = fxq.value('g_tuned', shape=[32], dtype=torch.bfloat16)
%g : bf16[32] = @norm.weight
%g_new : bf16[32] = fxq.rewrite(%g, %g_tuned)
%g_wide : f32[32] = aten._to_copy(%g_new, dtype=torch.float32)
%g_one : f32[32] = aten.add.Tensor(%g_wide, 1)
%h : f32[4,32] = aten.mul.Tensor(%g_one, %x)
%h_narrow : bf16[4,32] = aten._to_copy(%h, dtype=torch.bfloat16)
%scale_tuned : bf16[32] = fxq.value('scale_tuned', shape=[32], dtype=torch.bfloat16)
%scale : bf16[32] = @layer_norm.weight
%scale_new : bf16[32] = fxq.rewrite(%scale, %scale_tuned)
%shift_tuned : bf16[32] = fxq.value('shift_tuned', shape=[32], dtype=torch.bfloat16)
%shift : bf16[32] = @layer_norm.bias
%shift_new : bf16[32] = fxq.rewrite(%shift, %shift_tuned)
%n : bf16[4,32] = aten.layer_norm(%h_narrow, [32], %scale_new, %shift_new)
%other : bf16[32] = @gate.vector
%other_act : bf16[32] = aten.sigmoid(%other)
%y : bf16[4,32] = aten.mul.Tensor(%other_act, %n)
return [%y]
