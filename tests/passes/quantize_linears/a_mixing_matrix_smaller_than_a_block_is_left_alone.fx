pass: quantize-linears
rewrites: 1
--- before
%x : bf16[4,32] = placeholder()
%w : bf16[16,32] = @o_proj.weight
%y : bf16[4,16] = aten.linear(%x, %w)
%streams : bf16[4,4,4] = aten.view(%y, [4, 4, 4])
%mix : bf16[16,4] = @altup.weight
%mixed : bf16[4,4,16] = aten.linear(%streams, %mix)
return [%mixed, %y]
--- after
%x : bf16[4,32] = placeholder()
%w_input_amax : f32[] = fxq.amax(%x)
%w_input_q : bf16[4,32] = fxq.quantize(%x, %w_input_amax, format='nvfp4', scale='dynamic')
%w : bf16[16,32] = @o_proj.weight
%w_amax : f32[] = fxq.amax(%w)
%w_q : bf16[16,32] = fxq.quantize(%w, %w_amax, format='nvfp4', scale='max')
%y : bf16[4,16] = aten.linear(%w_input_q, %w_q)
%streams : bf16[4,4,4] = aten.view(%y, [4, 4, 4])
%mix : bf16[16,4] = @altup.weight
%mixed : bf16[4,4,16] = aten.linear(%streams, %mix)
return [%mixed, %y]
--- miss
mixed: a mixing matrix: it has 4 inputs, less than a block
