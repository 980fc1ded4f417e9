"""What output formats put on disk, a file each.

Each has tables from a number format's name to names and config entries, and `tensor_names`,
`weight_infos`, `weight_tensors`, `scalar_tensors` and `input_tensors` for a quantized tensor of the
checkpoint, `kv_infos` and `kv_tensors` for a cache's scales, and `config_files`. What its tables have no
entry for it refuses with CheckpointError.
"""

from typing import NamedTuple

from fxq.numbers.formats import FORMATS


class Scheme(NamedTuple):
    """How a weight and what it multiplies are quantized: the weight's number format, and whether inputs are
    quantized to it too."""

    format: str
    inputs: bool

    def __str__(self) -> str:
        title = FORMATS[self.format].title
        return title if self.inputs else f"{title} with plain inputs"
