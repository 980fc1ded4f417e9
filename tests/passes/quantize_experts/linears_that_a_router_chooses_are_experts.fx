pass: quantize-experts
rewrites: 6
--- before
%x : bf16[6,32] = placeholder()
%ids0 : i64[3] = placeholder()
%router : bf16[2,32] = @router.weight
%scores : bf16[6,2] = aten.linear(%x, %router)
%top : (bf16[6,1], i64[6,1]) = aten.topk(%scores, 1)
%chosen : i64[6,1] = operator.getitem(%top, 1)
%first : b8[6,1] = aten.eq.Scalar(%chosen, 0)
