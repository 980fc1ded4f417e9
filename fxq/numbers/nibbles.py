"""Nibbles: numbers of 4 bits, two a byte, the first in the low half: e2m1, and integers from -8 to 7."""

from collections.abc import Sequence

import torch
from torch import Tensor


def _pairs(values: Sequence[float]) -> Tensor:
    """The two numbers of each byte, as one float64 that is not to be calculated with: [256]."""
    of = torch.tensor(values, dtype=torch.float32)
    bytes_ = torch.arange(256)
    return torch.stack([of[bytes_ & 15], of[bytes_ >> 4]], -1).view(torch.float64).flatten()


_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_E2M1 = _pairs([*_MAGNITUDES, *(-m for m in _MAGNITUDES)])
_INT4 = _pairs([float(code - 8) for code in range(16)])


def e2m1(packed: Tensor) -> Tensor:
    """float32 [..., 2 n] that bytes [..., n] of e2m1 codes stand for (OCP Microscaling Formats v1.0)."""
    return _unpacked(packed, _E2M1)


def int4(packed: Tensor) -> Tensor:
    """float32 [..., 8 n] that int32 [..., n] stand for, 8 codes each, the lowest bits first; 0 is -8."""
    return _unpacked(packed, _INT4)


def _unpacked(packed: Tensor, pairs: Tensor) -> Tensor:
    # A byte looks up 8 bytes, which are its two numbers: one gather for both.
    codes = packed.contiguous().view(torch.uint8)
    found = pairs.to(packed.device).index_select(0, codes.flatten().int())
    return found.view(torch.float32).view(*codes.shape[:-1], 2 * codes.shape[-1])
