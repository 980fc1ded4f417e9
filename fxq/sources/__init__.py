"""Where weights come from: a directory of safetensors, or a live model."""

from fxq.sources.directory import Directory
from fxq.sources.live import Live

__all__ = ["Directory", "Live"]
