pass: fuse-experts
--- before
%x : bf16[4,32] = placeholder()
%w : bf16[3,16,32] = @experts.w
%y : bf16[3,4,16] = aten.einsum('ti,eoi->eto', [%x, %w])
return [%y]
--- error
VerifyError: %y: 
found aten.einsum
