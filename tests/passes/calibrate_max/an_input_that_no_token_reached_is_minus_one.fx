pass: calibrate-max
rewrites: 3
weights: {embed.weight: [1.0, -2.0, 3.0]}
batches: [[[0, 0, 0, 0]], [[0, 1, 0, 1]]]
--- before
%ids : i64[1,4] = placeholder()
%table : bf16[3,16] = @embed.weight
%emb : bf16[1,4,16] = aten.embedding(%table, %ids)
%x : bf16[4,16] = aten.view(%emb, [4, 16])
%which : i64[4] = aten.view(%ids, [4])
%is0 : bool[4] = aten.eq.Scalar(%which, 0)
%x0 : bf16[4,16] = aten.index.Tensor(%x, [%is0])
%w0 : bf16[16,16] = @experts.0.weight
%w0_input_amax : f32[] = fxq.amax(%x0)
%w0_input_q : bf16[4,16] = fxq.quantize(%x0, %w0_input_amax, format='nvfp4', scale='dynamic')
%w0_amax : f32[] = fxq.amax(%w0)
%w0_q : bf16[16,16] = fxq.quantize(%w0, %w0_amax, format='nvfp4', scale='max')
%y0 : bf16[4,16] = aten.linear(%w0_input_q, %w0_q)
%is1 : bool[4] = aten.eq.Scalar(%which, 1)
%x1 : bf16[4,16] = aten.index.Tensor(%x, [%is1])
%w1 : bf16[16,16] = @experts.1.weight
%w1_input_amax : f32[] = fxq.amax(%x1)
%w1_input_q : bf16[4,16] = fxq.quantize(%x1, %w1_input_amax, format='nvfp4', scale='dynamic')
%w1_amax : f32[] = fxq.amax(%w1)
%w1_q : bf16[16,16] = fxq.quantize(%w1, %w1_amax, format='nvfp4', scale='max')
%y1 : bf16[4,16] = aten.linear(%w1_input_q, %w1_q)
%is2 : bool[4] = aten.eq.Scalar(%which, 2)
%x2 : bf16[4,16] = aten.index.Tensor(%x, [%is2])
%w2 : bf16[16,16] = @experts.2.weight
%w2_input_amax : f32[] = fxq.amax(%x2)
%w2_input_q : bf16[4,16] = fxq.quantize(%x2, %w2_input_amax, format='nvfp4', scale='dynamic')
%w2_amax : f32[] = fxq.amax(%w2)
%w2_q : bf16[16,16] = fxq.quantize(%w2, %w2_amax, format='nvfp4', scale='max')
%y2 : bf16[4,16] = aten.linear(%w2_input_q, %w2_q)
return [%y0, %y1, %y2]
--- after
%ids : i64[1,4] = placeholder()
%table : bf16[3,16] = @embed.weight
%emb : bf16[1,4,16] = aten.embedding(%table, %ids)
%x : bf16[4,16] = aten.view(%emb, [4, 16])
%which : i64[4] = aten.view(%ids, [4])
%is0 : bool[4] = aten.eq.Scalar(%which, 0)
%x0 : bf16[4,16] = aten.index.Tensor(%x, [%is0])
%w0_input_amax : f32[] = fxq.amax(%x0)  # = 1
%w0_input_q : bf16[4,16] = fxq.quantize(%x0, %w0_input_amax, format='nvfp4', scale='dynamic')
%w0 : bf16[16,16] = @experts.0.weight
%w0_amax : f32[] = fxq.amax(%w0)
%w0_q : bf16[16,16] = fxq.quantize(%w0, %w0_amax, format='nvfp4', scale='max')
%y0 : bf16[4,16] = aten.linear(%w0_input_q, %w0_q)
%is1 : bool[4] = aten.eq.Scalar(%which, 1)
%x1 : bf16[4,16] = aten.index.Tensor(%x, [%is1])
%w1_input_amax : f32[] = fxq.amax(%x1)  # = 2
%w1_input_q : bf16[4,16] = fxq.quantize(%x1, %w1_input_amax, format='nvfp4', scale='dynamic')
%w1 : bf16[16,16] = @experts.1.weight
%w1_amax : f32[] = fxq.amax(%w1)
%w1_q : bf16[16,16] = fxq.quantize(%w1, %w1_amax, format='nvfp4', scale='max')
%y1 : bf16[4,16] = aten.linear(%w1_input_q, %w1_q)
%is2 : bool[4] = aten.eq.Scalar(%which, 2)
%x2 : bf16[4,16] = aten.index.Tensor(%x, [%is2])
%w2_input_amax : f32[] = fxq.amax(%x2)  # = -1
%w2_input_q : bf16[4,16] = fxq.quantize(%x2, %w2_input_amax, format='nvfp4', scale='dynamic')
%w2 : bf16[16,16] = @experts.2.weight
%w2_amax : f32[] = fxq.amax(%w2)
%w2_q : bf16[16,16] = fxq.quantize(%w2, %w2_amax, format='nvfp4', scale='max')
%y2 : bf16[4,16] = aten.linear(%w2_input_q, %w2_q)
return [%y0, %y1, %y2]
