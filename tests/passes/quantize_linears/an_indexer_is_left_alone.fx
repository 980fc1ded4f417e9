pass: quantize-linears
--- before
%x : bf16[4,32] = placeholder()
%wq : bf16[16,32] = @indexer.wq.weight
%q : bf16[4,16] = aten.linear(%x, %wq)
%wk : bf16[16,32] = @indexer.wk.weight
%k : bf16[4,16] = aten.linear(%x, %wk)
%kt : bf16[16,4] = aten.t(%k)
%scores : bf16[4,4] = aten.mm(%q, %kt)
%top : (bf16[4,2], i64[4,2]) = aten.topk(%scores, 2)
%chosen : i64[4,2] = operator.getitem(%top, 1)
%w : bf16[32,32] = @o_proj.weight
%y : bf16[4,32] = aten.linear(%x, %w)
%lm : bf16[8,32] = @lm_head.weight
%logits : bf16[4,8] = aten.linear(%y, %lm)
return [%logits, %chosen]
--- miss
q: an indexer: %top chooses by its and 1 other results
k: an indexer
