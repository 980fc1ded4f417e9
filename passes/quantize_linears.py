"""quantize-linears: linears and their inputs; never routers or other gates, and unless they are named neither
the output head nor what engines absorb."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import ClassVar

import torch
from torch.fx import Node

from fxq.errors import SpecError, VerifyError
from fxq.graph import edit
from fxq.graph.hub import Hub
from fxq.graph.layers import outer_layers
from fxq.graph.pattern import Bind, Call, Match, Miss, Rule, Weight
from fxq.graph.program import Program
from fxq.graph.structure.attention import attentions, latent_projection
from fxq.graph.structure.groups import head, routers
from fxq.graph.structure.matmuls import Frontiers, weight_matmuls
from fxq.graph.structure.views import is_quantized, parameter_name, shape_of
from fxq.numbers.formats import FORMATS, InputFormat, WeightFormat, check_pair
from fxq.pipeline.base import Pass, check_counts, nothing_matched
from fxq.pipeline.facts import Fact, amaxes_filled, amaxes_shared, groups_whole, weights_quantized

# Linears with fewer inputs than a block of NVFP4 mix streams or heads, whatever their format would be.
_FEW_INPUTS = 16

LINEAR = Rule("linear", Call(torch.ops.aten.linear.default, Bind("x"), Weight("w", rank=2)))


@dataclass(frozen=True)
class QuantizeLinears(Pass):
    """Quantize the weight of every linear, and what it multiplies.

    Several such passes make a mixture, each taking what earlier ones left.
    The output head is taken only with `head`, or if `only` names it without wildcards, as is the expansion of
    a cached latent (MLA's kv_b): engines multiply it into queries and outputs, for which vLLM 0.32 takes its
    values by sending an identity matrix through its quantized input, which distorts or clips them.

    weights: their format.
    inputs: the activations' format, or none for weight-only; fp8 goes with fp8 alone.
    only: globs over module names (`*.mlp.*`); a linear is taken if one of them fits.
    skip: globs over module names; a linear that one of them fits is not taken, whatever `only` says.
    head: whether the output head is taken too; engines have to read such a head (vLLM 0.33, SGLang 0.5.23).
    stored: in what the source holds the linears that are taken, such as MXFP4; empty takes any.
    skip_first: so many layers at the front are left as they are.
    skip_last: so many layers at the end are left as they are.
    partial: leave a linear whose input dimension does not fit the format, instead of failing.
    """

    weights: WeightFormat = "nvfp4"
    inputs: InputFormat = "nvfp4"
    only: tuple[str, ...] = ("*",)
    skip: tuple[str, ...] = ()
    head: bool = False
    stored: tuple[str, ...] = ()
    skip_first: int = 0
    skip_last: int = 0
    partial: bool = False

    name: ClassVar[str] = "quantize-linears"
    ensures: ClassVar[tuple[Fact, ...]] = (groups_whole,)
    breaks: ClassVar[tuple[Fact, ...]] = (amaxes_shared, amaxes_filled)
    flags: ClassVar[tuple[str, ...]] = ("partial",)

    def __post_init__(self) -> None:
        check_pair(self.weights, self.inputs, self.name)
        check_counts(self.name, skip_first=self.skip_first, skip_last=self.skip_last)

    @classmethod
    def bystander(cls) -> "QuantizeLinears":
        return cls(only=())

    def sites(self, program: Program) -> Iterator[Match | Miss]:
        """Every matmul by a 2-D parameter; those left alone miss with the structural reason or the glob."""
        frontiers = Frontiers(program.graph)
        chosen_by, output_head = routers(program.graph, frontiers), head(program.graph, frontiers)
        absorbed = {latent_projection(frontiers, attention) for attention in attentions(program.graph)}
        makers, matmuls = Counter(chosen_by.values()), list(weight_matmuls(program.graph))
        outer = outer_layers((_module(m.parameter) for m in matmuls), self.skip_first, self.skip_last)
        for matmul in matmuls:
            if is_quantized(matmul.w) or len(shape_of(matmul.parameter)) != 2:
                continue
            result = LINEAR.match(matmul.node)
            if isinstance(result, Miss):
                yield replace(result, decided=True)
                continue
            module = _module(matmul.parameter)
            reason = None
            if (choice := chosen_by.get(matmul.node)) is not None and makers[choice] > 1:
                reason = f"an indexer: %{choice.name} chooses by its and {makers[choice] - 1} other results"
            elif choice is not None:
                reason = f"a router: %{choice.name} chooses by its result"
            elif matmul.node is output_head and not self.head and module not in self.only:
                reason = "the output head: its result leaves the model"
            elif matmul.node in absorbed and module not in self.only:
                reason = "the expansion of a cached latent: engines absorb it, which takes its plain values"
            elif shape_of(result["w"])[0] == 1:
                reason = "a gate: it has a single output"
            elif shape_of(result["w"])[1] < _FEW_INPUTS:
                reason = f"a mixing matrix: it has {shape_of(result['w'])[1]} inputs, less than a block"
            elif not _is_module_weight(program.hub, str(matmul.parameter.target)):
                title = FORMATS[self.weights].title
                reason = f"no linear module's: {title} has names for `<module>.weight` alone"
            elif (left := program.left.get(str(matmul.parameter.target))) is not None:
                reason = left
            elif not self.only:
                reason = "no pass of the spec quantizes linears"
            elif (held := program.hub.encoding_of(str(matmul.parameter.target))) not in (
                self.stored or (held,)
            ):
                reason = (
                    f"the source holds it in {held or 'plain numbers'}, not in {' or '.join(self.stored)}"
                )
            elif not self._wanted(module):
                reason = f"not selected by only={list(self.only)}, skip={list(self.skip)}"
            elif module in outer:
                reason = outer[module]
            yield result if reason is None else Miss(LINEAR.name, matmul.node, reason, depth=2, decided=True)

    def run(self, program: Program) -> int:
        self._check_globs(program)
        found = [site for site in self.sites(program) if isinstance(site, Match)]
        matches = [site for site in found if self._fits(site, program)]
        # A model whose linears are all experts leaves nothing to do here, which is no mistake.
        if not matches and weights_quantized(program) is not None:
            raise nothing_matched(self, program, "linears to quantize")
        inputs: dict[Node, Node] = {}
        weights: dict[Node, Node] = {}
        for site in matches:
            w, x = site["w"], site["x"]
            if w not in weights:
                weights[w] = edit.quantize(w, w.name, format=self.weights, scale="max")
            edit.replace(w, weights[w], [site.node])
            if self.inputs != "none":
                if x not in inputs:
                    scale = FORMATS[self.inputs].input_scale
                    inputs[x] = edit.quantize(x, f"{w.name}_input", format=self.inputs, scale=scale)
                edit.replace(x, inputs[x], [site.node])
        return len(matches)

    def _fits(self, site: Match, program: Program) -> bool:
        """Whether the format can hold a linear; if not, it is left (`partial`) or a VerifyError."""
        width, format = shape_of(site["w"])[-1], FORMATS[self.weights]
        fits = format.holds(width)
        if not fits:
            name = parameter_name(site["w"])
            reason = f"its input dimension is {width}; {format.title} needs a multiple of {format.block}"
            if not self.partial:
                module = name.removesuffix(".weight")
                raise VerifyError(
                    f"{name}: {reason}. Leave it out with skip: [{module!r}], or --allow-partial"
                )
            program.left[name] = reason
        return fits

    def _wanted(self, module: str) -> bool:
        return any(fnmatchcase(module, g) for g in self.only) and not any(
            fnmatchcase(module, g) for g in self.skip
        )

    def _check_globs(self, program: Program) -> None:
        """A name that no linear has is a spelling mistake, and so is an `only` whose globs fit none."""
        modules = sorted({_module(m.parameter) for m in weight_matmuls(program.graph)})
        listed = ", ".join(modules[:6]) + (", ..." if modules[6:] else "")
        for glob in (*self.only, *self.skip):
            if not set("*?[") & set(glob) and glob not in modules:
                raise SpecError(f"quantize-linears: no linear is called {glob!r}; there are {listed}")
        if not any(fnmatchcase(module, glob) for module in modules for glob in self.only):
            raise SpecError(f"quantize-linears: no linear fits only={list(self.only)}; there are {listed}")


def _is_module_weight(hub: Hub, name: str) -> bool:
    """Whether the checkpoint holds a parameter as weights of modules; a hub that does not know it cannot
    say no."""
    held = hub.names.get(name) or hub.stored.get(name)
    return held is None or all(key.endswith(".weight") for keys in held.keys for key in keys)


def _module(parameter: Node) -> str:
    return str(parameter.target).removesuffix(".weight")
