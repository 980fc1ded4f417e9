"""What the first use of a GPU takes seconds for (its context, its libraries, on a new machine the kernel's
compilation) happens while the model is traced.
"""

import contextlib
import threading

import torch

from fxq.numbers import nvfp4


def begin(device: torch.device, scale: str) -> None:
    """Use a GPU on another thread as packing will; `scale` as in `nvfp4.quantize_weight`."""
    if device.type == "cuda":
        threading.Thread(target=_use, args=(device, scale), name="fxq-warm-up").start()


def _use(device: torch.device, scale: str) -> None:
    with contextlib.suppress(Exception):  # whoever uses it for the result says what is wrong with it
        w = torch.ones(1, 16, 64, dtype=torch.bfloat16, device=device)
        torch.nn.functional.linear(w, w[0])
        nvfp4.quantize_measured(w, w.float().amax((1, 2)), scale)
