pass: calibrate-bootstrap
rewrites: 1
values: {x0_amax: 3.0, x1_amax: -1.0}
--- before
%x0 : bf16[2,16] = placeholder()
%x1 : bf16[2,16] = placeholder()
%w : bf16[2,16,16] = @experts.w
%w_0 : bf16[16,16] = fxq.slice(%w, 0)
%w_0_amax : f32[] = fxq.amax(%w_0)
%w_1 : bf16[16,16] = fxq.slice(%w, 1)
%w_1_amax : f32[] = fxq.amax(%w_1)
%w_amax : f32[] = fxq.sync([%w_0_amax, %w_1_amax])
%w_0_q : bf16[16,16] = fxq.quantize(%w_0, %w_amax, format='nvfp4', scale='max')
%w_1_q : bf16[16,16] = fxq.quantize(%w_1, %w_amax, format='nvfp4', scale='max')
%x0_amax : f32[] = fxq.amax(%x0)
%x1_amax : f32[] = fxq.amax(%x1)
%x_amax : f32[] = fxq.sync([%x0_amax, %x1_amax])
%x0_q : bf16[2,16] = fxq.quantize(%x0, %x_amax, format='nvfp4', scale='dynamic')
%x1_q : bf16[2,16] = fxq.quantize(%x1, %x_amax, format='nvfp4', scale='dynamic')
%y0 : bf16[2,16] = aten.linear(%x0_q, %w_0_q)
%y1 : bf16[2,16] = aten.linear(%x1_q, %w_1_q)
return [%y0, %y1]
--- after
%x0 : bf16[2,16] = placeholder()
%x1 : bf16[2,16] = placeholder()
%w : bf16[2,16,16] = @experts.w
%w_0 : bf16[16,16] = fxq.slice(%w, 0)
%w_0_amax : f32[] = fxq.amax(%w_0)
%w_1 : bf16[16,16] = fxq.slice(%w, 1)
%w_1_amax : f32[] = fxq.amax(%w_1)
%w_amax : f32[] = fxq.sync([%w_0_amax, %w_1_amax])
%w_0_q : bf16[16,16] = fxq.quantize(%w_0, %w_amax, format='nvfp4', scale='max')
%w_1_q : bf16[16,16] = fxq.quantize(%w_1, %w_amax, format='nvfp4', scale='max')
%x0_amax : f32[] = fxq.amax(%x0)  # = 3
%x1_amax : f32[] = fxq.amax(%x1)  # = -1
%x_amax : f32[] = fxq.sync([%x0_amax, %x1_amax])
%x_amax_unseen : f32[] = aten.scalar_tensor(448.0, dtype=torch.float32)
%x_amax_or : f32[] = fxq.first([%x_amax, %x_amax_unseen])
%x0_q : bf16[2,16] = fxq.quantize(%x0, %x_amax_or, format='nvfp4', scale='dynamic')
%x1_q : bf16[2,16] = fxq.quantize(%x1, %x_amax_or, format='nvfp4', scale='dynamic')
%y0 : bf16[2,16] = aten.linear(%x0_q, %w_0_q)
%y1 : bf16[2,16] = aten.linear(%x1_q, %w_1_q)
return [%y0, %y1]
