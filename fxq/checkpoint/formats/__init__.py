"""What output formats put on disk, a file each.

Each has `weight_infos`, `weight_tensors` and `scalar_tensors` for a quantized tensor of the checkpoint,
`kv_infos` and `kv_tensors` for a cache's scales, and `config_files`.
"""

from enum import StrEnum


class Scheme(StrEnum):
    """How a weight and what it multiplies are quantized; the values are ModelOpt's names."""

    NVFP4 = "NVFP4"
    W4A16 = "W4A16_NVFP4"
    FP8 = "FP8"
