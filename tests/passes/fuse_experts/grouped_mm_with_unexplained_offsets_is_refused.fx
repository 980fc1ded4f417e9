pass: fuse-experts
--- before
%x : bf16[4,32] = placeholder()
%offsets : i32[3] = placeholder()
%w : bf16[3,32,16] = @experts.w
%y : bf16[4,16] = aten._grouped_mm(%x, %w, %offsets)
return [%y]
--- error
VerifyError: %y: _grouped_mm: expected aten.cumsum, found placeholder at %offsets
