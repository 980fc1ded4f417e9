pass: learn
rewrites: 1
--- before
%x : bf16[4,32] = placeholder()
%ids : i64[4] = placeholder()
%x_amax : f32[] = fxq.amax(%x)
%x_q : bf16[4,32] = fxq.quantize(%x, %x_amax, format='nvfp4', scale='dynamic')
%w : bf16[2,16,32] = @experts.up_proj
%w_e0 : bf16[16,32] = fxq.slice(%w, 0)
%w_e0_amax : f32[] = fxq.amax(%w_e0)
%w_e0_q : bf16[16,32] = fxq.quantize(%w_e0, %w_e0_amax, format='nvfp4', scale='max')
%w_e1 : bf16[16,32] = fxq.slice(%w, 1)
%w_e1_amax : f32[] = fxq.amax(%w_e1)
%w_e1_q : bf16[16,32] = fxq.quantize(%w_e1, %w_e1_amax, format='nvfp4', scale='max')
%w_q : bf16[2,16,32] = fxq.stack([%w_e0_q, %w_e1_q])
%y : bf16[4,16] = fxq.expert_linear(%x_q, %w_q, %ids)
return [%y]
--- after
%x : bf16[4,32] = placeholder()
%ids : i64[4] = placeholder()
%x_amax : f32[] = fxq.amax(%x)
%x_q : bf16[4,32] = fxq.quantize(%x, %x_amax, format='nvfp4', scale='dynamic')
%w : bf16[2,16,32] = @experts.up_proj
%w_e0 : bf16[16,32] = fxq.slice(%w, 0)
%w_e0_amax : f32[] = fxq.amax(%w_e0)
%w_q_codes : u8[2,16,16] = fxq.value('w_q_codes', shape=[2, 16, 16], dtype=torch.uint8)
%w_q_codes_e0 : u8[16,16] = fxq.slice(%w_q_codes, 0)
%w_q_scales : f8e4m3[2,16,2] = fxq.value('w_q_scales', shape=[2, 16, 2], dtype=torch.float8_e4m3fn)
%w_q_scales_e0 : f8e4m3[16,2] = fxq.slice(%w_q_scales, 0)
%w_e0_q : bf16[16,32] = fxq.rounded(%w_e0, %w_e0_amax, %w_q_codes_e0, %w_q_scales_e0, format='nvfp4')
%w_e1 : bf16[16,32] = fxq.slice(%w, 1)
%w_e1_amax : f32[] = fxq.amax(%w_e1)
%w_q_codes_e1 : u8[16,16] = fxq.slice(%w_q_codes, 1)
%w_q_scales_e1 : f8e4m3[16,2] = fxq.slice(%w_q_scales, 1)
%w_e1_q : bf16[16,32] = fxq.rounded(%w_e1, %w_e1_amax, %w_q_codes_e1, %w_q_scales_e1, format='nvfp4')
%w_q : bf16[2,16,32] = fxq.stack([%w_e0_q, %w_e1_q])
%y : bf16[4,16] = fxq.expert_linear(%x_q, %w_q, %ids)
return [%y]
