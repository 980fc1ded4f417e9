"""Batches: samples as tensors, nothing padded."""

from __future__ import annotations

import torch

from fxq.run.batches import TOKENS_PER_BATCH, batches


def test_batches_hold_every_sample_once_without_padding() -> None:
    given = [[i] * (1 + i % 4) for i in range(40)]
    made = batches(given)
    assert all(batch.dtype == torch.int64 and batch.dim() == 2 for batch in made)
    assert sorted(row for batch in made for row in batch.tolist()) == sorted(given)


def test_batches_stay_near_the_token_budget() -> None:
    made = batches([[1] * 100] * 100 + [[1] * (2 * TOKENS_PER_BATCH)] * 2)
    assert sum(b.numel() for b in made) == 10_000 + 4 * TOKENS_PER_BATCH
    assert all(b.numel() <= TOKENS_PER_BATCH or len(b) == 1 for b in made)
