pass: quantize-linears
rewrites: 1
hub:
  tensors: {hc_attn_fn: "bf16[8,32]", o_proj.weight: "bf16[16,32]"}
  stored:
    hc_attn_fn: {keys: [[hc_attn_fn]]}
    o_proj.weight: {keys: [[o_proj.weight]]}
--- before
%x : bf16[4,32] = placeholder()
%fn : bf16[8,32] = @hc_attn_fn
%mix : bf16[4,8] = aten.linear(%x, %fn)
%w : bf16[16,32] = @o_proj.weight
%y : bf16[4,16] = aten.linear(%x, %w)
return [%mix, %y]
--- after
%x : bf16[4,32] = placeholder()
%fn : bf16[8,32] = @hc_attn_fn
%mix : bf16[4,8] = aten.linear(%x, %fn)
%w_input_amax : f32[] = fxq.amax(%x)
%w_input_q : bf16[4,32] = fxq.quantize(%x, %w_input_amax, format='nvfp4', scale='dynamic')
%w : bf16[16,32] = @o_proj.weight
%w_amax : f32[] = fxq.amax(%w)
%w_q : bf16[16,32] = fxq.quantize(%w, %w_amax, format='nvfp4', scale='max')
%y : bf16[4,16] = aten.linear(%w_input_q, %w_q)
return [%mix, %y]
--- miss
mix: no linear module's
