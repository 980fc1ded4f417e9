pass: calibrate-bootstrap
rewrites: 1
values: {w_e0_amax: 1.0, w_e1_amax: 1.0, w_e2_amax: 1.0, w_e0_input_amax: 3.0, w_e2_input_amax: 5.0}
batches: []
--- before
%x0 : bf16[4,32] = placeholder()
%x1 : bf16[3,32] = placeholder()
%x2 : bf16[3,32] = placeholder()
%w : bf16[3,16,32] = @moe.input_linear.weight
%w_e0 : bf16[16,32] = fxq.slice(%w, 0)
%w_e0_input_amax : f32[] = fxq.amax(%x0)
%w_e0_input_q : bf16[4,32] = fxq.quantize(%x0, %w_e0_input_amax, format='nvfp4', scale='dynamic')
%w_e0_amax : f32[] = fxq.amax(%w_e0)
%w_e0_q : bf16[16,32] = fxq.quantize(%w_e0, %w_e0_amax, format='nvfp4', scale='max')
%y0 : bf16[4,16] = aten.linear(%w_e0_input_q, %w_e0_q)
%w_e1 : bf16[16,32] = fxq.slice(%w, 1)
%w_e1_input_amax : f32[] = fxq.amax(%x1)
%w_e1_input_q : bf16[3,32] = fxq.quantize(%x1, %w_e1_input_amax, format='nvfp4', scale='dynamic')
%w_e1_amax : f32[] = fxq.amax(%w_e1)
%w_e1_q : bf16[16,32] = fxq.quantize(%w_e1, %w_e1_amax, format='nvfp4', scale='max')
%y1 : bf16[3,16] = aten.linear(%w_e1_input_q, %w_e1_q)
%w_e2 : bf16[16,32] = fxq.slice(%w, 2)
%w_e2_input_amax : f32[] = fxq.amax(%x2)
%w_e2_input_q : bf16[3,32] = fxq.quantize(%x2, %w_e2_input_amax, format='nvfp4', scale='dynamic')
%w_e2_amax : f32[] = fxq.amax(%w_e2)
%w_e2_q : bf16[16,32] = fxq.quantize(%w_e2, %w_e2_amax, format='nvfp4', scale='max')
%y2 : bf16[3,16] = aten.linear(%w_e2_input_q, %w_e2_q)
return [%y0, %y1, %y2]
--- after
%x0 : bf16[4,32] = placeholder()
%x1 : bf16[3,32] = placeholder()
%x2 : bf16[3,32] = placeholder()
%w : bf16[3,16,32] = @moe.input_linear.weight
%w_e0 : bf16[16,32] = fxq.slice(%w, 0)
%w_e0_input_amax : f32[] = fxq.amax(%x0)  # = 3
%w_e0_input_q : bf16[4,32] = fxq.quantize(%x0, %w_e0_input_amax, format='nvfp4', scale='dynamic')
%w_e0_amax : f32[] = fxq.amax(%w_e0)  # = 1
%w_e0_q : bf16[16,32] = fxq.quantize(%w_e0, %w_e0_amax, format='nvfp4', scale='max')
%y0 : bf16[4,16] = aten.linear(%w_e0_input_q, %w_e0_q)
%w_e1 : bf16[16,32] = fxq.slice(%w, 1)
%w_e1_input_amax : f32[] = fxq.amax(%x1)  # = 5
%w_e1_input_q : bf16[3,32] = fxq.quantize(%x1, %w_e1_input_amax, format='nvfp4', scale='dynamic')
%w_e1_amax : f32[] = fxq.amax(%w_e1)  # = 1
%w_e1_q : bf16[16,32] = fxq.quantize(%w_e1, %w_e1_amax, format='nvfp4', scale='max')
%y1 : bf16[3,16] = aten.linear(%w_e1_input_q, %w_e1_q)
%w_e2 : bf16[16,32] = fxq.slice(%w, 2)
%w_e2_input_amax : f32[] = fxq.amax(%x2)  # = 5
%w_e2_input_q : bf16[3,32] = fxq.quantize(%x2, %w_e2_input_amax, format='nvfp4', scale='dynamic')
%w_e2_amax : f32[] = fxq.amax(%w_e2)  # = 1
%w_e2_q : bf16[16,32] = fxq.quantize(%w_e2, %w_e2_amax, format='nvfp4', scale='max')
%y2 : bf16[3,16] = aten.linear(%w_e2_input_q, %w_e2_q)
return [%y0, %y1, %y2]
