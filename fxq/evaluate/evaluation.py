"""`fxq.evaluate`: what a model makes of a text, and how far that is from what another makes of it.

Both run as they would be served, layer by layer. Base and model go through their last layers in step, a batch
at a time: of logits there are never more than one batch's of each (4096 tokens times the vocabulary), and
between layers no more is kept than the residual streams.
"""

import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fxq.arguments import check_callable, check_counts, check_flags
from fxq.cli import tables
from fxq.errors import SourceError
from fxq.evaluate.served import served
from fxq.graph.program import Program
from fxq.model import AnyModel, Model, device_of, open_model, samples_of
from fxq.pipeline.base import Progress
from fxq.run import likelihood
from fxq.run.batches import predicted_batches
from fxq.run.simulate import simulation
from fxq.run.streaming import Streaming
from fxq.run.work import total

EVAL_SAMPLES, EVAL_SEQ_LEN = 64, 512  # if nothing is said
QUANTILES = {"median": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}


@dataclass(frozen=True)
class Divergence:
    """How the model's predictions differ from the base's, per predicted token.

    kl: KL(base || model) in nats: mean, median, p90, p99, max. kl_by_sample: the mean of each sample, in the
    order in which they were run, by which two models can be compared that have one base, on one text.
    top1_agreement: the share of tokens where both rank the same one first.
    """

    base: str
    perplexity: float
    kl: Mapping[str, float]
    kl_by_sample: tuple[float, ...]
    top1_agreement: float


@dataclass(frozen=True)
class Evaluation:
    """perplexity: exp of the mean loss over `tokens` predicted tokens of `samples` samples. against: the
    comparison with the base, if one was given. notes: what was cut, or simulated otherwise than stored."""

    model: str
    samples: int
    tokens: int
    perplexity: float
    against: Divergence | None
    notes: tuple[str, ...]
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def evaluate(
    model: AnyModel,
    text: object,
    *,
    base: AnyModel | Model | None = None,
    samples: int = EVAL_SAMPLES,
    seq_len: int = EVAL_SEQ_LEN,
    device: str | torch.device = "auto",
    follow_links: bool = False,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Evaluation:
    """Perplexity of a model on a text; with `base`, of both, and how their predictions differ.

    model, base: a directory of safetensors, unquantized or quantized (of ModelOpt's or compressed-tensors',
    whoever wrote it, inputs and KV cache are quantized as it declares), or a live model. text: given as for
    calibration; the first `samples`, cut to `seq_len` tokens. device: "auto" (a GPU if there is one), "cpu"
    or "cuda". progress: bars in a terminal or notebook by default. Raises SpecError, SourceError or
    TraceError.
    """
    where, start = device_of(device), time.perf_counter()
    check_counts(samples=samples)
    check_counts(2, seq_len=seq_len)
    check_flags(follow_links=follow_links, trust_remote_code=trust_remote_code)
    check_callable("progress", progress)
    given = [model] if base is None else [model, base]
    options = {"follow_links": follow_links, "trust_remote_code": trust_remote_code}
    models = [open_model(m, served=True, **options) for m in given]
    names = [_name(one, held) for one, held in zip(given, models, strict=True)]
    _check_vocabularies(names, models)
    length = min(seq_len, *map(_longest, models))
    ids = samples_of(_with_tokenizer(models), text, samples, length, name="text")
    programs = [served(held) for held in models]
    batches = predicted_batches(programs, ids)
    runs = [simulation(program, held.source, where) for program, held in zip(programs, models, strict=True)]
    shown = tables.shown_in_python if progress is None else progress
    with shown("evaluate", sum(total(run.graph, batches) for run in runs)) as step:
        for run in runs:
            run.step = step
        losses, apart = _run(runs, batches)
    return Evaluation(
        names[0],
        sum(len(batch) for batch in batches),
        len(losses[0]),
        likelihood.perplexity(losses[0]),
        _divergence(names[1], losses[1], batches, *apart) if apart is not None else None,
        tuple(_notes(names, programs)),
        time.perf_counter() - start,
    )


def _run(
    runs: Sequence[Streaming], batches: Sequence[Tensor]
) -> tuple[list[Tensor], tuple[Tensor, Tensor] | None]:
    """(losses of each model, divergences of the first from the second if there is one) per token."""
    losses: list[list[Tensor]] = [[] for _ in runs]
    apart: list[tuple[Tensor, Tensor]] = []
    with closing(runs[0].stream(batches)) as first, closing(runs[-1].stream(batches)) as second:
        for i, logits in first:
            losses[0].append(likelihood.losses(logits, batches[i]))
            if len(runs) > 1:
                _, expected = next(second)
                losses[1].append(likelihood.losses(expected, batches[i]))
                apart.append(likelihood.divergences(expected, logits))
                del expected
            del logits
    joined = [torch.cat(parts) for parts in losses]
    if not apart:
        return joined, None
    kl, same = zip(*apart, strict=True)
    return joined, (torch.cat(kl), torch.cat(same))


def _divergence(base: str, losses: Tensor, batches: Sequence[Tensor], kl: Tensor, same: Tensor) -> Divergence:
    ordered = kl.sort().values
    found = {name: float(ordered[min(int(q * len(kl)), len(kl) - 1)]) for name, q in QUANTILES.items()}
    parts = kl.split([len(batch) * (batch.shape[1] - 1) for batch in batches])
    by_sample = [
        part.view(len(batch), -1).mean(1).tolist() for part, batch in zip(parts, batches, strict=True)
    ]
    return Divergence(
        base,
        likelihood.perplexity(losses),
        {"mean": float(kl.mean()), **found},
        tuple(value for values in by_sample for value in values),
        float(same.double().mean()),
    )


def _name(model: AnyModel | Model, held: Model) -> str:
    if isinstance(model, (str, Path)):
        return str(model)
    return held.name if isinstance(model, Model) else type(held.fake.model).__name__


def _vocabulary(model: Model) -> int:
    return int(model.fake.config.get_text_config().vocab_size)


def _longest(model: Model) -> int:
    """How many positions a model has; without a limit, more than any text."""
    return int(getattr(model.fake.config.get_text_config(), "max_position_embeddings", None) or 1 << 62)


def _check_vocabularies(names: Sequence[str], models: Sequence[Model]) -> None:
    sizes = [_vocabulary(model) for model in models]
    if len(set(sizes)) > 1:
        raise SourceError(
            f"{names[0]} has a vocabulary of {sizes[0]} tokens, the base {names[1]} one of {sizes[1]}: "
            "expected the same, as their predictions are compared token by token"
        )


def _with_tokenizer(models: Sequence[Model]) -> Model:
    """The model whose directory may have a tokenizer; the base's is the same."""
    has = (m for m in models if m.directory is not None and any(m.directory.glob("tokenizer*")))
    return next(has, models[0])


def _notes(names: Sequence[str], programs: Sequence[Program]) -> list[str]:
    """What the programs say, each with the name of its model if there are two."""
    single = len(programs) == 1
    return [
        note if single else f"{name}: {note}"
        for name, program in zip(names, programs, strict=True)
        for note in program.notes
    ]
