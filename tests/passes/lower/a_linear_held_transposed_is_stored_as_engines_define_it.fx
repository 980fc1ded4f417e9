pass: lower
rewrites: 1
hub:
  tensors: {attn.c_proj.weight: "bf16[32,16]"}
  stored:
    attn.c_proj.weight: {keys: [[attn.c_proj.weight]]}
--- before
%x : bf16[4,32] = placeholder()
%w : bf16[32,16] = @attn.c_proj.weight
%wt : bf16[16,32] = aten.t(%w)
%wt_amax : f32[] = fxq.amax(%wt)
%wt_q : bf16[16,32] = fxq.quantize(%wt, %wt_amax, format='nvfp4', scale='max')
%y : bf16[4,16] = aten.linear(%x, %wt_q)
return [%y]
--- after
%w : bf16[32,16] = @attn.c_proj.weight
%wt : bf16[16,32] = aten.t(%w)
%wt_amax : f32[] = fxq.amax(%wt)
%wt_packed : [u8[16,16], f8e4m3[16,2], f32[]] = fxq.pack(%wt, %wt_amax, format='nvfp4', scale='max')
%wt_packed_0 : none = fxq.store_linear('attn.c_proj', %wt_packed, None, start=0, end=16)
return ()
