"""Batches: samples of token ids as tensors of sizes that the traced graphs hold for."""

from collections import defaultdict
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from fxq.errors import SourceError, TraceError
from fxq.graph.program import Program

TOKENS_PER_BATCH = 4096


def batches(samples: Iterable[Sequence[int]]) -> list[Tensor]:
    """int64 [B, S] batches of samples of equal length, about TOKENS_PER_BATCH tokens each: nothing is
    padded."""
    by_length: dict[int, list[Sequence[int]]] = defaultdict(list)
    for ids in samples:
        by_length[len(ids)].append(ids)
    made = []
    for length, group in sorted(by_length.items()):
        step = max(1, TOKENS_PER_BATCH // length)
        made += [torch.tensor(group[i : i + step], dtype=torch.long) for i in range(0, len(group), step)]
    return made


def batches_of(programs: Sequence[Program], samples: Sequence[Sequence[int]]) -> list[Tensor]:
    """Batches of sizes that the traces of all programs hold for; what is too long is cut, and notes of the
    first say so."""
    notes = programs[0].notes

    def refused(batch: int, length: int) -> str | None:
        return next((why for p in programs if (why := p.accepts(batch, length)) is not None), None)

    fitting: dict[int, int] = {}
    for length in {len(ids) for ids in samples}:
        reason = refused(1, length)
        fitting[length] = next((n for n in range(length, 0, -1) if refused(1, n) is None), 0)
        note = f"the trace holds up to {fitting[length]} tokens ({reason}); longer samples were cut"
        if fitting[length] == 0:
            note = f"the trace holds for no sample of {length} tokens ({reason}); such samples were left out"
        if reason is not None and note not in notes:
            notes.append(note)
    if not any(fitting.values()):
        raise TraceError(f"the trace holds for no sample of up to {max(fitting)} tokens: {reason}")
    samples = [ids for ids in samples if fitting[len(ids)]]
    made = batches([ids[: fitting[len(ids)]] for ids in samples])
    if all(refused(*batch.shape) is None for batch in made):
        return made
    return [row[None] for batch in made for row in batch]


def some_batches(program: Program, batches: Sequence[Tensor], tokens: int) -> list[Tensor]:
    """About so many tokens of batches int64 [B, S], in whole samples with a token to predict, evenly spread
    over all; one sample at least. SourceError if none has a token to predict."""
    rows = [row for batch in batches for row in batch if len(row) > 1]
    if not rows:
        raise SourceError("predictions are compared on samples of two tokens or more; the text has none")
    step = max(1, round(sum(map(len, rows)) / tokens))
    return batches_of([program], [row.tolist() for row in rows[::step]])


def predicted_batches(programs: Sequence[Program], samples: Sequence[Sequence[int]]) -> list[Tensor]:
    """`batches_of` samples that have a token to predict; SourceError if none has."""
    check_predicted(samples)
    longer = [ids for ids in samples if len(ids) > 1]
    batches = [batch for batch in batches_of(programs, longer) if batch.shape[1] > 1]
    check_predicted(batch[0].tolist() for batch in batches)
    return batches


def check_predicted(samples: Iterable[Sequence[int]]) -> None:
    """SourceError unless some sample has a token to predict."""
    if not any(len(ids) > 1 for ids in samples):
        raise SourceError("perplexity needs samples of two tokens or more")
