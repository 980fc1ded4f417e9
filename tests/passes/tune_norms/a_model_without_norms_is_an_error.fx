pass: tune-norms
--- before
%x : bf16[4,32] = placeholder()
%w : bf16[16,32] = @up_proj.weight
%y : bf16[4,16] = aten.linear(%x, %w)
return [%y]
--- error
VerifyError: tune-norms rewrote nothing: expected weights that scale activations, found none
