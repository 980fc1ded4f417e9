pass: fuse-experts
rewrites: 0
--- before
%x : bf16[5,2,32] = placeholder()
%q : bf16[32,4,16] = @attn.q
%o : bf16[32,4,16] = @attn.o
%heads : bf16[5,2,4,16] = aten.einsum('ibh,hnd->ibnd', [%x, %q])
%y : bf16[5,2,32] = aten.einsum('ibnd,hnd->ibh', [%heads, %o])
return [%y]
--- after
%x : bf16[5,2,32] = placeholder()
%q : bf16[32,4,16] = @attn.q
%heads : bf16[5,2,4,16] = aten.einsum('ibh,hnd->ibnd', [%x, %q])
%o : bf16[32,4,16] = @attn.o
%y : bf16[5,2,32] = aten.einsum('ibnd,hnd->ibh', [%heads, %o])
return [%y]
