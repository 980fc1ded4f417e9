pass: quantize-kv
options: {scale: calibrate}
rewrites: 2
--- before
%q : bf16[2,3,4,16] = placeholder()
%k : bf16[2,3,16,4] = placeholder()
%v : bf16[2,3,4,16] = placeholder()
%mask : bf16[2,1,4,4] = placeholder()
%sinks : bf16[2,3,4,1] = placeholder()
%scores : bf16[2,3,4,4] = aten.matmul(%q, %k)
%scaled : bf16[2,3,4,4] = aten.mul.Tensor(%scores, 0.25)
%masked : bf16[2,3,4,4] = aten.add.Tensor(%scaled, %mask)
%joined : bf16[2,3,4,5] = aten.cat([%masked, %sinks], -1)
%soft : bf16[2,3,4,5] = aten.softmax.int(%joined, -1)
%cut : bf16[2,3,4,4] = aten.slice.Tensor(%soft, 3, 0, -1)
%y : bf16[2,3,4,16] = aten.matmul(%cut, %v)
return [%y]
--- after
%q : bf16[2,3,4,16] = placeholder()
%k : bf16[2,3,16,4] = placeholder()
%v : bf16[2,3,4,16] = placeholder()
%mask : bf16[2,1,4,4] = placeholder()
%sinks : bf16[2,3,4,1] = placeholder()
%y_k_amax : f32[] = fxq.amax(%k)
%y_k_q : bf16[2,3,16,4] = fxq.quantize(%k, %y_k_amax, format='fp8', scale='max')
%scores : bf16[2,3,4,4] = aten.matmul(%q, %y_k_q)
%scaled : bf16[2,3,4,4] = aten.mul.Tensor(%scores, 0.25)
%masked : bf16[2,3,4,4] = aten.add.Tensor(%scaled, %mask)
%joined : bf16[2,3,4,5] = aten.cat([%masked, %sinks], -1)
%soft : bf16[2,3,4,5] = aten.softmax.int(%joined, -1)
%cut : bf16[2,3,4,4] = aten.slice.Tensor(%soft, 3, 0, -1)
%y_v_amax : f32[] = fxq.amax(%v)
%y_v_q : bf16[2,3,4,16] = fxq.quantize(%v, %y_v_amax, format='fp8', scale='max')
%y : bf16[2,3,4,16] = aten.matmul(%cut, %y_v_q)
return [%y]
