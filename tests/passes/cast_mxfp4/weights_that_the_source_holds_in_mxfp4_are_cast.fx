pass: cast-mxfp4
rewrites: 2
hub:
  encodings: {gate.weight: MXFP4, up.weight: MXFP4, down.weight: FP8}
--- before
%x : bf16[4,32] = placeholder()
%gate_weight_input_amax : f32[] = fxq.amax(%x)
%gate_weight_input_q : bf16[4,32] = fxq.quantize(%x, %gate_weight_input_amax, format='nvfp4', scale='dynamic')
%gate_weight : bf16[32,32] = @gate.weight
%gate_weight_amax : f32[] = fxq.amax(%gate_weight)
%up_weight : bf16[32,32] = @up.weight
%up_weight_amax : f32[] = fxq.amax(%up_weight)
%group_amax : f32[] = fxq.sync([%gate_weight_amax, %up_weight_amax])
%gate_weight_q : bf16[32,32] = fxq.quantize(%gate_weight, %group_amax, format='nvfp4', scale='max')
%gate : bf16[4,32] = aten.linear(%gate_weight_input_q, %gate_weight_q)
%up_weight_q : bf16[32,32] = fxq.quantize(%up_weight, %group_amax, format='nvfp4', scale='max')
%up : bf16[4,32] = aten.linear(%gate_weight_input_q, %up_weight_q)
%product : bf16[4,32] = aten.mul.Tensor(%gate, %up)
%down_weight : bf16[32,32] = @down.weight
%down_weight_amax : f32[] = fxq.amax(%down_weight)
%down_weight_q : bf16[32,32] = fxq.quantize(%down_weight, %down_weight_amax, format='nvfp4', scale='max')
%down : bf16[4,32] = aten.linear(%product, %down_weight_q)
return [%down]
--- after
%x : bf16[4,32] = placeholder()
%gate_weight_input_amax : f32[] = fxq.amax(%x)
%gate_weight_input_q : bf16[4,32] = fxq.quantize(%x, %gate_weight_input_amax, format='nvfp4', scale='dynamic')
%gate_weight : bf16[32,32] = @gate.weight
%gate_weight_amax : f32[] = fxq.amax(%gate_weight)
%up_weight : bf16[32,32] = @up.weight
%up_weight_amax : f32[] = fxq.amax(%up_weight)
%group_amax : f32[] = fxq.sync([%gate_weight_amax, %up_weight_amax])
%gate_weight_q : bf16[32,32] = fxq.cast_mxfp4(%gate_weight, %group_amax, format='nvfp4')
%gate : bf16[4,32] = aten.linear(%gate_weight_input_q, %gate_weight_q)
%up_weight_q : bf16[32,32] = fxq.cast_mxfp4(%up_weight, %group_amax, format='nvfp4')
%up : bf16[4,32] = aten.linear(%gate_weight_input_q, %up_weight_q)
%product : bf16[4,32] = aten.mul.Tensor(%gate, %up)
%down_weight : bf16[32,32] = @down.weight
%down_weight_amax : f32[] = fxq.amax(%down_weight)
%down_weight_q : bf16[32,32] = fxq.quantize(%down_weight, %down_weight_amax, format='nvfp4', scale='max')
%down : bf16[4,32] = aten.linear(%product, %down_weight_q)
return [%down]
--- miss
gate_weight_input_q: its operand is an activation
down_weight_q: the source holds it in FP8, not in MXFP4
