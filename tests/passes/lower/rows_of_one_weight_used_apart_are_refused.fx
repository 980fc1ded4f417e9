pass: lower
--- before
%x : bf16[4,32] = placeholder()
%w : bf16[48,32] = @attn.in_proj_weight
%q : bf16[16,32] = aten.slice.Tensor(%w, 0, 0, 16)
%q_amax : f32[] = fxq.amax(%q)
%kv : bf16[32,32] = aten.slice.Tensor(%w, 0, 16, 48)
%kv_amax : f32[] = fxq.amax(%kv)
%q_group_amax : f32[] = fxq.sync([%q_amax, %kv_amax])
%q_q : bf16[16,32] = fxq.quantize(%q, %q_group_amax, format='nvfp4', scale='max')
%y : bf16[4,16] = aten.linear(%x, %q_q)
%kv_q : bf16[32,32] = fxq.quantize(%kv, %q_group_amax, format='nvfp4', scale='max')
%z : bf16[4,32] = aten.linear(%x, %kv_q)
return [%y, %z]
--- error
VerifyError: attn.in_proj_weight
