"""Model card: the README.md of an output that has none, of what its report says."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

README = "README.md"
# By which a card that fxq wrote is known, so that no other is ever replaced.
_MARK = "<!-- written by fxq, which may write it anew -->"


def card(made: Mapping[str, Any]) -> str:
    """A card in the hub's form: what it was made from and how, its figures, how to serve it.

    made: report.json.
    """
    return "\n".join([*_front(made), _MARK, "", *_body(made)]) + "\n"


def is_ours(path: Path) -> bool:
    """Whether a file is a card that fxq wrote."""
    try:
        return _MARK in path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return False


def _front(made: Mapping[str, Any]) -> Iterator[str]:
    """The part in YAML, which the hub reads; JSON is YAML, so that no name can break it."""
    yield "---"
    if (name := _hub_name(made)) is not None:
        yield f"base_model: {json.dumps(name)}"
        yield "base_model_relation: quantized"
    yield "tags: [nvfp4, fxq]"
    yield "---"


def _hub_name(made: Mapping[str, Any]) -> str | None:
    """What the hub calls the base model; a path of one's own machine is nobody else's business."""
    name, at, _ = str(made["made"].get("model", "")).partition("@")
    return name if at and not name.startswith("/") else None


def _body(made: Mapping[str, Any]) -> Iterator[str]:
    how, summary = made["made"], made["summary"]
    yield f"# {made['title']}, {made['spec']}"
    yield ""
    yield f"An NVFP4 checkpoint of `{_hub_name(made) or made['title']}`, made by fxq {made['fxq']}."
    yield ""
    yield "| | |"
    yield "|---|---|"
    for label, value in _figures(summary):
        yield f"| {label} | {value} |"
    for label in ("calibration", "evaluation"):
        if (text := how.get(label)) is not None:
            yield f"| {label} text | {text['samples']} samples, {text['tokens']:,} tokens |"
    yield ""
    yield "It is served as it is: `vllm serve DIR`, and alike in SGLang and TensorRT-LLM."
    yield ""
    yield "What was quantized, what was not and why: `fxq-report/report.html`. The spec:"
    yield ""
    yield "```json"
    yield json.dumps(how.get("spec", {}), indent=2, ensure_ascii=False).replace("```", "` ` `")
    yield "```"


def _figures(summary: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    if summary["output_bytes"] and summary["source_bytes"]:
        before, after = summary["source_bytes"], summary["output_bytes"]
        yield "size", f"{after / 1e9:.4g} GB, {after / before:.1%} of the base model's"
    if summary["bits_per_weight"] is not None:
        yield "bits per quantized weight", f"{summary['bits_per_weight']:.3f}"
    if summary["sqnr_db"] is not None:
        yield "error of the weights", f"{summary['sqnr_db']:.2f} dB (SQNR)"
    if summary["perplexity_after"] is not None:
        yield "perplexity", f"{summary['perplexity_after']:.4f}"
    if summary["perplexity_before"] is not None:
        yield "of the base model", f"{summary['perplexity_before']:.4f}"
    if summary["kl_divergence"] is not None:
        yield "KL from the base model", f"{summary['kl_divergence']:.5f} nats per token"
    if summary["top1_agreement"] is not None:
        yield "top-1 agreement", f"{summary['top1_agreement']:.2%}"
