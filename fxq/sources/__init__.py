"""Sources: where weights come from, and the text that a model is calibrated on.

directory: a model's directory, by way of its files (files, safetensors_file), decoded where its weights are
encoded (encodings: the table of layouts; encoded_weight; activations: what engines do beside). live: a model
in memory, by way of its parameters (parameters). locate: what a user's name of a model means. conversion: how
the tensors of a checkpoint make up parameters, for both, found by probing. prefetch: files read ahead.
fingerprint: what tells two runs apart. samples: calibration text as token ids, of text_files among others.
"""

from fxq.sources.directory import Directory
from fxq.sources.live import Live

__all__ = ["Directory", "Live"]
