pass: quantize-experts
rewrites: 2
--- before
%x0 : bf16[4,32] = placeholder()
%x1 : bf16[3,32] = placeholder()
%w : bf16[2,16,32] = @moe.input_linear.weight
%w_e0 : bf16[16,32] = fxq.slice(%w, 0)
%y0 : bf16[4,16] = aten.linear(%x0, %w_e0)
%w_e1 : bf16[16,32] = fxq.slice(%w, 1)
%y1 : bf16[3,16] = aten.linear(%x1, %w_e1)
return [%y0, %y1]
--- after
%x0 : bf16[4,32] = placeholder()
%x1 : bf16[3,32] = placeholder()
%w : bf16[2,16,32] = @moe.input_linear.weight
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
return [%y0, %y1]
