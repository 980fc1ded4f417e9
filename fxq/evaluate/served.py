"""The graph of a checkpoint as engines serve it: weights come decoded, and what they multiply and what
attentions cache is quantized where, and as, the checkpoint says."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor
from torch.fx import Node

from fxq.errors import SourceError, and_more
from fxq.graph import dialect, edit
from fxq.graph.arguments import int_at, node_at
from fxq.graph.hub import Hub
from fxq.graph.places import cache_module
from fxq.graph.program import Program
from fxq.graph.structure.attention import attentions
from fxq.graph.structure.matmuls import Frontiers, WeightMatmul, weight_matmuls
from fxq.graph.structure.views import VIEWS, strip
from fxq.graph.text import format_target
from fxq.model import Model
from fxq.numbers.formats import FORMATS
from fxq.passes import PASSES
from fxq.pipeline.run import run_passes
from fxq.pipeline.spec import parse
from fxq.sources import Directory
from fxq.sources.activations import Activations, InputScale

# The passes that make the graph of a checkpoint from that of its model.
_EXPERTS = parse("passes: [{fuse-experts: {partial: true}}]", PASSES, "served")
_CACHES = parse("passes: [{quantize-kv: {required: false}}]", PASSES, "served")
_TAKE_INPUTS = (torch.ops.aten.linear.default, dialect.EXPERT_LINEAR)


def served(model: Model) -> Program:
    """The model's program, run by `simulation`; SourceError if its checkpoint quantizes what the graph cannot
    show.

    Notes say what is simulated otherwise than the checkpoint's tensors say.
    """
    program, source = model.program, model.source
    run_passes(_EXPERTS.passes, program)
    if isinstance(source, Directory) and source.activations is not None:
        program.notes += source.activations.notes
        _quantize_inputs(program, source, source.activations)
        edit.tidy(program.graph)
        if source.activations.fp8_cache:
            notes = list(program.notes)
            run_passes(_CACHES.passes, program)
            program.notes = notes  # what the pass says of calibration is no news here
            _fill_caches(program, source, source.activations)
    return program


def _quantize_inputs(program: Program, source: Directory, activations: Activations) -> None:
    """A quantize node before every matmul whose weight has an input scale; experts share the largest, as
    engines have it."""
    quantized: dict[tuple[Node, str, float], Node] = {}
    left, differing = dict(activations.inputs), list[str]()
    for matmul in list(weight_matmuls(program.graph)):
        keys = [key for key in _keys(program.hub, matmul) if key in activations.inputs]
        scales = {key: activations.inputs[key] for key in keys}
        if not scales:
            continue
        for key in keys:
            left.pop(key, None)
        format, values = _format(scales, matmul), {_scale(source, scale) for scale in scales.values()}
        if len(values) > 1:
            differing.append(keys[0])
        known = (matmul.x, format, max(values))
        if known not in quantized:
            name = f"{matmul.parameter.name}_input"
            quantized[known] = _quantize(program, matmul.x, name, format, max(values))
        edit.replace(matmul.x, quantized[known], [matmul.node])
    if differing:
        program.notes.append(
            f"{and_more(differing)}: its input scale differs from its siblings'; engines, and "
            "this simulation, take the largest"
        )
    extra = set(program.hub.extra)
    if unseen := [key for key in left if key not in extra]:
        program.notes.append(
            f"{and_more(unseen)}: the graph shows no matmul by it; its input is simulated unquantized"
        )


def _keys(hub: Hub, matmul: WeightMatmul) -> Iterable[str]:
    """The tensors of the checkpoint that a matmul's weight is made of."""
    stored = hub.stored.get(str(matmul.parameter.target))
    piece = strip(matmul.w, VIEWS)
    for part in stored.parts if stored is not None else ():
        if stored is not None and stored.stacked and piece.target is dialect.SLICE:
            yield part.keys[int_at(piece, 1)]
        else:
            yield from part.keys


def _format(scales: Mapping[str, InputScale], matmul: WeightMatmul) -> str:
    """How the input of a matmul is quantized, by the scales of all that its weight is made of."""
    first, last = next(iter(scales)), list(scales)[-1]
    formats = {scale.format for scale in scales.values()}
    if len(formats) > 1:
        titles = [format.title for name, format in FORMATS.items() if name in formats]
        raise SourceError(f"{first}: read together with {last}, but one is {', the other '.join(titles)}")
    if matmul.node.target not in _TAKE_INPUTS:
        raise SourceError(
            f"{first} has an input scale, but the model uses it in %{matmul.node.name} "
            f"({format_target(matmul.node.target)}), which is no linear"
        )
    return formats.pop()


def _quantize(program: Program, x: Node, name: str, format: str, scale: float) -> Node:
    amax = edit.call(x.graph, f"{name}_amax", dialect.AMAX, x)
    program.values[amax.name] = _amax(torch.tensor(scale), format)
    kind = FORMATS[format].input_scale
    return edit.call(x.graph, f"{name}_q", dialect.QUANTIZE, x, amax, format=format, scale=kind)


def _scale(source: Directory, scale: InputScale) -> float:
    """The largest of a tensor of input scales, 1 without any; SourceError unless all are positive and
    finite."""
    if scale.key is None:
        return 1.0
    values = source.read_stored(scale.key).to(torch.float32)
    values = values.reciprocal() if scale.is_divisor else values
    if not bool((torch.isfinite(values) & (values > 0)).all()):
        raise SourceError(
            f"{source.path}: {scale.key}: expected a positive finite scale, found "
            f"{values.flatten()[:4].tolist()}"
        )
    return float(values.max())


def _amax(scale: Tensor, format: str) -> Tensor:
    """The amax whose scale is this one, or its neighbour where float32 has none."""
    scale_of = FORMATS[format].scale_of
    near = scale * FORMATS[format].largest
    candidates = [near, *(torch.nextafter(near, torch.tensor(end)) for end in (0.0, torch.inf))]
    return min(candidates, key=lambda amax: float((scale_of(amax) - scale).abs()))


def _fill_caches(program: Program, source: Directory, activations: Activations) -> None:
    """The scales of each attention's keys and values; 1.0 where the checkpoint has none, as engines have it,
    and where it has one alone, that for both."""
    frontiers = Frontiers(program.graph)
    bare, scaled = list[str](), 0
    for attention in attentions(program.graph):
        caches = [t for t in (attention.k, attention.v) if t.target is dialect.QUANTIZE]
        if not any(node_at(t, 1).target is dialect.AMAX for t in caches):
            continue
        module = cache_module(program.hub, frontiers, attention.k, attention.v)
        found = _cache_scales(activations.cache_scales, module)
        bare, scaled = (bare, scaled + 1) if found else ([*bare, module], scaled)
        for cache, kind in zip(caches, "kv", strict=True):
            key, format = found.get(kind) or next(iter(found.values()), None), str(cache.kwargs["format"])
            value = _scale(source, InputScale(key, format)) if key is not None else 1.0
            if (hole := node_at(cache, 1)).target is dialect.AMAX:
                program.values[hole.name] = _amax(torch.tensor(value), format)
    if bare and scaled:
        program.notes.append(f"{and_more(bare)}: no KV scale, although others have one; engines take 1.0")


def _cache_scales(keys: Iterable[str], module: str) -> dict[str, str]:
    """k, v -> the tensor that holds the scale of one attention's cache: `k_proj.k_scale` or `k_scale`."""
    within = (key for key in keys if key.startswith(f"{module}."))
    near = [key for key in within if key.removeprefix(f"{module}.").count(".") <= 1]
    return {key.rpartition(".")[2][0]: key for key in near}
