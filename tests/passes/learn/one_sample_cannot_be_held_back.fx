pass: learn
batches: [[[1, 2, 3]]]
--- before
%ids : i64[1,3] = placeholder()
%table : bf16[8,32] = @table
%x : bf16[1,3,32] = aten.embedding(%table, %ids)
%w : bf16[16,32] = @up_proj.weight
%w_amax : f32[] = fxq.amax(%w)
%w_q : bf16[16,32] = fxq.quantize(%w, %w_amax, format='nvfp4', scale='max')
%y : bf16[1,3,16] = aten.linear(%x, %w_q)
return [%y]
--- error
SourceError: learn holds a part of the calibration text back: expected two samples or more, found 1
