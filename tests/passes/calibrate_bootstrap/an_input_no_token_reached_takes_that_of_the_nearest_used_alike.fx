pass: calibrate-bootstrap
values: {a_amax: 3.0, c_amax: 5.0}
batches: [[[0, 1]]]
--- before
%a : bf16[2,16] = placeholder()
%b : bf16[2,16] = placeholder()
%c : bf16[2,32] = placeholder()
%wa : bf16[16,16] = @experts.0.weight
%wa_amax : f32[] = fxq.amax(%wa)
%wa_q : bf16[16,16] = fxq.quantize(%wa, %wa_amax, format='nvfp4', scale='max')
%a_amax : f32[] = fxq.amax(%a)
%a_q : bf16[2,16] = fxq.quantize(%a, %a_amax, format='nvfp4', scale='dynamic')
%ya : bf16[2,16] = aten.linear(%a_q, %wa_q)
%wb : bf16[16,16] = @experts.1.weight
%wb_amax : f32[] = fxq.amax(%wb)
%wb_q : bf16[16,16] = fxq.quantize(%wb, %wb_amax, format='nvfp4', scale='max')
%b_amax : f32[] = fxq.amax(%b)
%b_q : bf16[2,16] = fxq.quantize(%b, %b_amax, format='nvfp4', scale='dynamic')
%yb : bf16[2,16] = aten.linear(%b_q, %wb_q)
%wc : bf16[16,32] = @other.weight
%wc_amax : f32[] = fxq.amax(%wc)
%wc_q : bf16[16,32] = fxq.quantize(%wc, %wc_amax, format='nvfp4', scale='max')
%c_amax : f32[] = fxq.amax(%c)
%c_q : bf16[2,32] = fxq.quantize(%c, %c_amax, format='nvfp4', scale='dynamic')
%yc : bf16[2,16] = aten.linear(%c_q, %wc_q)
return [%ya, %yb, %yc]
--- after
%a : bf16[2,16] = placeholder()
%b : bf16[2,16] = placeholder()
%c : bf16[2,32] = placeholder()
%wa : bf16[16,16] = @experts.0.weight
%wa_amax : f32[] = fxq.amax(%wa)  # = 3.23438
%wa_q : bf16[16,16] = fxq.quantize(%wa, %wa_amax, format='nvfp4', scale='max')
%a_amax : f32[] = fxq.amax(%a)  # = 3
%a_q : bf16[2,16] = fxq.quantize(%a, %a_amax, format='nvfp4', scale='dynamic')
%ya : bf16[2,16] = aten.linear(%a_q, %wa_q)
%wb : bf16[16,16] = @experts.1.weight
%wb_amax : f32[] = fxq.amax(%wb)  # = 3.03125
%wb_q : bf16[16,16] = fxq.quantize(%wb, %wb_amax, format='nvfp4', scale='max')
%b_amax : f32[] = fxq.amax(%b)  # = 3
%b_q : bf16[2,16] = fxq.quantize(%b, %b_amax, format='nvfp4', scale='dynamic')
%yb : bf16[2,16] = aten.linear(%b_q, %wb_q)
%wc : bf16[16,32] = @other.weight
%wc_amax : f32[] = fxq.amax(%wc)  # = 3.76562
%wc_q : bf16[16,32] = fxq.quantize(%wc, %wc_amax, format='nvfp4', scale='max')
%c_amax : f32[] = fxq.amax(%c)  # = 5
%c_q : bf16[2,32] = fxq.quantize(%c, %c_amax, format='nvfp4', scale='dynamic')
%yc : bf16[2,16] = aten.linear(%c_q, %wc_q)
return [%ya, %yb, %yc]
