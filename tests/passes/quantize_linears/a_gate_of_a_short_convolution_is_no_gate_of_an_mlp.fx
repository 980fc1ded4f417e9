pass: quantize-linears
options: {skip: ["*weight_proj"]}
--- before
%x : bf16[1,8,32] = placeholder()
%values : bf16[64,32] = @v_proj.weight
%v : bf16[1,8,64] = aten.linear(%x, %values)
%steps : bf16[1,64,8] = aten.transpose.int(%v, 1, 2)
%padded : bf16[1,64,11] = aten.constant_pad_nd(%steps, [3, 0])
%unfolded : bf16[1,64,8,4] = aten.unfold(%padded, -1, 4, 1)
%windows : bf16[1,8,64,4] = aten.transpose.int(%unfolded, 1, 2)
%taps : bf16[256,32] = @weight_proj.weight
%t : bf16[1,8,256] = aten.linear(%x, %taps)
%weights : bf16[1,8,64,4] = aten.view(%t, [1, 8, 64, 4])
%weighed : bf16[1,8,64,4] = aten.mul.Tensor(%windows, %weights)
%summed : bf16[1,8,64] = aten.sum.dim_IntList(%weighed, [-1])
%last : bf16[8,64] = @lm_head.weight
%logits : bf16[1,8,8] = aten.linear(%summed, %last)
return [%logits]
--- after
%x : bf16[1,8,32] = placeholder()
%values_input_amax : f32[] = fxq.amax(%x)
%values_input_q : bf16[1,8,32] = fxq.quantize(%x, %values_input_amax, format='nvfp4', scale='dynamic')
%values : bf16[64,32] = @v_proj.weight
%values_amax : f32[] = fxq.amax(%values)
%values_q : bf16[64,32] = fxq.quantize(%values, %values_amax, format='nvfp4', scale='max')
%v : bf16[1,8,64] = aten.linear(%values_input_q, %values_q)
%steps : bf16[1,64,8] = aten.transpose.int(%v, 1, 2)
%padded : bf16[1,64,11] = aten.constant_pad_nd(%steps, [3, 0])
%unfolded : bf16[1,64,8,4] = aten.unfold(%padded, -1, 4, 1)
%windows : bf16[1,8,64,4] = aten.transpose.int(%unfolded, 1, 2)
%taps : bf16[256,32] = @weight_proj.weight
%t : bf16[1,8,256] = aten.linear(%x, %taps)
%weights : bf16[1,8,64,4] = aten.view(%t, [1, 8, 64, 4])
%weighed : bf16[1,8,64,4] = aten.mul.Tensor(%windows, %weights)
%summed : bf16[1,8,64] = aten.sum.dim_IntList(%weighed, [-1])
%last : bf16[8,64] = @lm_head.weight
%logits : bf16[1,8,8] = aten.linear(%summed, %last)
return [%logits]
