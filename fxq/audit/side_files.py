"""What else a served model needs: a tokenizer, one kind of weights, matrices in the model's dtype."""

from collections.abc import Iterator

from fxq.audit.checkpoint import Checkpoint
from fxq.audit.findings import Finding

_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")
_OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack")
_DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


def check(checkpoint: Checkpoint) -> Iterator[Finding]:
    """Files beside the shards, and the dtype of what was left alone."""
    path = checkpoint.store.path
    present = {file.name for file in path.iterdir() if file.is_file()}
    if not present & set(_TOKENIZERS) and not any(name.endswith(".tiktoken") for name in present):
        yield Finding("tokenizer-missing", path.name, f"expected one of {', '.join(_TOKENIZERS)}; found none")
    if "generation_config.json" not in present:
        yield Finding("generation-missing", "generation_config.json", "expected, found none")
    for name in sorted(present):
        if name.endswith(_OTHER_WEIGHTS) and name != "training_args.bin":
            yield Finding("weights-stray", name, "expected safetensors only")
    stated = checkpoint.config.get("dtype", checkpoint.config.get("torch_dtype"))
    dtype = _DTYPES.get(str(stated))
    for name, entry in checkpoint.matrices.items():
        if dtype is not None and entry.dtype != dtype:
            yield Finding("dtype-mixed", name, f"expected {dtype}, found {entry}")
