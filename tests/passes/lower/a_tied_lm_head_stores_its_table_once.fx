pass: lower
rewrites: 1
hub:
  tensors: {embed.weight: "bf16[8,16]", a.weight: "bf16[16,16]"}
  modules: [lm_head]
--- before
%ids : i64[1,4] = placeholder()
%table : bf16[8,16] = @embed.weight
%x : bf16[1,4,16] = aten.embedding(%table, %ids)
%a : bf16[16,16] = @a.weight
%a_amax : f32[] = fxq.amax(%a)
%a_q : bf16[16,16] = fxq.quantize(%a, %a_amax, format='nvfp4', scale='max')
%y : bf16[1,4,16] = aten.linear(%x, %a_q)
%logits : bf16[1,4,8] = aten.linear(%y, %table)
return [%logits]
--- after
%a : bf16[16,16] = @a.weight
%a_amax : f32[] = fxq.amax(%a)
%a_packed : [u8[16,8], f8e4m3[16,1], f32[]] = fxq.pack(%a, %a_amax, format='nvfp4', scale='max')
%a_packed_0 : none = fxq.store_linear('a', %a_packed, None, start=0, end=16)
%embed_weight_ : bf16[8,16] = fxq.load('embed.weight', shape=[8, 16], dtype=torch.bfloat16)
%embed_weight_store : none = fxq.store('embed.weight', %embed_weight_)
return ()
