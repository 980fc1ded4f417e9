"""What passes decide is what files hold, bit for bit: roundings of third parties, codes from values, unlike
options side by side; and a run that is killed while it decides goes on to the same bytes."""

import json
import subprocess
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.fx import Node
from transformers import Qwen3MoeConfig

import fxq
from fxq.graph import dialect, edit
from fxq.graph.arguments import int_at, node_at, nodes_at
from fxq.graph.pattern import Match
from fxq.graph.program import Program
from fxq.graph.structure.matmuls import as_weight_matmul, weight_matmuls
from fxq.graph.structure.views import VIEWS, parameter_name, shape_of, strip
from fxq.numbers import nvfp4
from fxq.passes.calibrate_bootstrap import CalibrateBootstrap
from fxq.passes.calibrate_max import CalibrateMax
from fxq.passes.fuse_experts import FuseExperts
from fxq.passes.lower import Lower
from fxq.passes.quantize_experts import QuantizeExperts
from fxq.passes.quantize_linears import QuantizeLinears
from fxq.passes.sync_groups import SyncGroups
from fxq.pipeline.base import Pass
from fxq.pipeline.facts import amaxes_filled, amaxes_shared, is_weight_quantize
from fxq.pipeline.spec import Spec, shipped
from tests import reader, reference, tiny
from tests.docs import ROOT
from tests.families import Zoo, random_model, samples, save, without_times, write_lines, zoo

__all__ = ["zoo"]

SLOW = pytest.mark.slow
ATEN = torch.ops.aten
Array = reader.Array


def _flipped(t: Tensor, amax: Tensor, flips: Tensor, *, format: str, scale: str) -> nvfp4.Measured:
    """For t [n, out, in], amax [n] and flips u8 [n]: codes with these bits changed, scales of maxima."""
    scale_2 = nvfp4.global_scale(amax)
    scales = nvfp4.max_scales(t, scale_2)
    return nvfp4.decided(t, amax, nvfp4.pack(t, scales, scale_2) ^ flips[:, None, None], scales)


FLIPPED = dialect.rounding(
    "test_rewritten::flipped(Tensor t, Tensor amax, Tensor flips, *, str format, str scale) -> Tensor",
    pack=_flipped,
)


def _flips(name: str, expert: int | None) -> int:
    """Other bits for each weight, which no search would find."""
    return zlib.crc32(f"{name} {expert}".encode()) % 256


def _expert(quantize: Node) -> int | None:
    piece = strip(node_at(quantize, 0), VIEWS)
    return int_at(piece, 1) if piece.target is dialect.SLICE else None


@dataclass(frozen=True)
class OfWeights(Pass):
    """Change how weights are rounded."""

    def sites(self, program: Program) -> Iterator[Match]:
        for node in list(program.graph.nodes):
            if is_weight_quantize(node):
                yield Match("weight", node, {"w": node_at(node, 0)})

    def run(self, program: Program) -> int:
        sites = list(self.sites(program))
        for site in sites:
            edit.replace(site.node, self.rounded(program, site.node))
        return len(sites)

    def rounded(self, program: Program, quantize: Node) -> Node:
        raise NotImplementedError


@dataclass(frozen=True)
class Flip(OfWeights):
    """A rounding of its own, with an argument of its own for each weight."""

    name: ClassVar[str] = "flip"

    def rounded(self, program: Program, quantize: Node) -> Node:
        flips = torch.tensor(_flips(parameter_name(quantize), _expert(quantize)), dtype=torch.uint8)
        name = f"{quantize.name}_flips"
        program.values[name] = flips
        value = edit.value(quantize.graph, name, flips)
        made = f"{quantize.name}_flipped"
        return edit.call(quantize.graph, made, FLIPPED, *quantize.args, value, **quantize.kwargs)


def _decided(name: str, expert: int | None, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Codes and block scales for a weight, whatever it is."""
    generator = torch.Generator().manual_seed(_flips(name, expert))
    codes = torch.randint(0, 256, (shape[0], shape[1] // 2), generator=generator, dtype=torch.uint8)
    scales = torch.randint(1, 127, (shape[0], shape[1] // 16), generator=generator, dtype=torch.uint8)
    return codes, scales.view(torch.float8_e4m3fn)


@dataclass(frozen=True)
class Decide(OfWeights):
    """Codes and scales from values."""

    name: ClassVar[str] = "decide"

    def rounded(self, program: Program, quantize: Node) -> Node:
        graph, values = quantize.graph, []
        found = _decided(parameter_name(quantize), _expert(quantize), shape_of(quantize))
        for part, tensor in zip(("codes", "scales"), found, strict=True):
            name = f"{quantize.name}_{part}"
            program.values[name] = tensor
            values.append(edit.value(graph, name, tensor))
        made = f"{quantize.name}_decided"
        return edit.call(graph, made, dialect.ROUNDED, *quantize.args, *values, format="nvfp4")


@dataclass(frozen=True)
class SearchOdd(OfWeights):
    """The scales of odd experts are searched, those of the others and of linears reach their maxima."""

    name: ClassVar[str] = "search-odd"

    def rounded(self, program: Program, quantize: Node) -> Node:
        scale = "mse" if (_expert(quantize) or 0) % 2 else "max"
        kwargs: dict[str, Any] = {**quantize.kwargs, "scale": scale}
        made = f"{quantize.name}_{scale}"
        return edit.call(quantize.graph, made, dialect.QUANTIZE, *quantize.args, **kwargs)


def _spec(step: Pass) -> Spec:
    passes: list[Pass] = [FuseExperts(partial=True), QuantizeExperts(inputs="none", required=False)]
    passes += [QuantizeLinears(inputs="none", partial=True), SyncGroups()]
    return Spec("decided", "", (*passes, step, CalibrateBootstrap(), Lower()))


@dataclass(frozen=True)
class Held:
    """Rows of one quantized weight (an expert's, if it is one) as the file holds them and as the source does:
    source f32 [out, in], codes u8 [out, in / 2], scales as bytes [out, in / 16], and the tensor's scale."""

    name: str
    expert: int | None
    rows: range
    source: Array
    codes: Array
    scales: Array
    scale_2: np.float32


def _matrix(t: Array, transposed: bool) -> Array:
    return np.ascontiguousarray(np.swapaxes(t, -1, -2)) if transposed else np.asarray(t)


def _held(compiled: fxq.Compiled, out: Path, source: Path) -> Iterator[Held]:
    """Every quantized weight's parts, one for each place that holds rows of it."""
    made, given = reader.read_checkpoint(out), reader.read_checkpoint(source)
    names = {made.part(name): name for name in made.quantized_linears()}
    stored, counts = compiled.program.hub.stored, dict[str, int]()
    for node in compiled.graph.nodes:
        if node.op == "get_attr" and len(shape_of(node)) == 3:
            counts[str(node.target)] = shape_of(node)[0]
    seen = set()
    for parameter, kept in stored.items():
        start = 0
        for part in kept.parts:
            for index, key in enumerate(part.keys):
                name = next((n for n in (key.removesuffix(".weight"), key) if n in names.values()), None)
                if name is None or (parameter, key) in seen:
                    continue
                seen.add((parameter, key))
                codes, scales = (made.raw(made.part(name, s)) for s in ("weight", "weight_scale"))
                whole, unit = given.array(key), made.multiplier(name, "weight_scale_2")
                turned = made.packed_axis(name) == -2
                codes, scales = _matrix(codes, turned), _matrix(scales, turned)
                whole = _matrix(whole, whole.shape[-1] != 2 * codes.shape[-1] or turned)
                count = 1 if kept.stacked else counts.get(parameter, 1)
                codes, scales, whole = (t.reshape(count, -1, t.shape[-1]) for t in (codes, scales, whole))
                for e in range(count):
                    expert = index if kept.stacked else e if parameter in counts else None
                    own = slice(part.rows.start, part.rows.stop, part.rows.step)
                    if turned:  # `part.rows` are of the tensor, and count inputs
                        assert len(kept.parts) == 1
                        own = slice(None)
                    parts = [t[e][own] for t in (whole, codes, scales)]
                    rows = range(start, start + len(parts[0]))
                    yield Held(parameter, expert, rows, parts[0], parts[1], parts[2], unit)
            start += len(part.rows)


FORMS = [
    ("qwen3_moe", "modelopt"),  # linears; experts stacked from tensors of their own, gate and up apart
    pytest.param("qwen3_moe", "compressed-tensors", marks=SLOW),
    pytest.param("phi3", "compressed-tensors", marks=SLOW),  # joined rows that are one linear
    pytest.param("granitemoe", "modelopt", marks=SLOW),  # all experts are rows of one tensor
    ("gpt_oss", "modelopt"),  # the same, transposed, gate and up interleaved
    pytest.param("llama4_text", "modelopt", marks=SLOW),
]


def _written(family: str, format: str, step: Pass, tmp_path: Path) -> tuple[fxq.Compiled, list[Held]]:
    model = tiny.tiny_model(next(f for f in tiny.families() if f.name == family))
    source = save(model, tmp_path / "source")
    compiled = fxq.compile(source, _spec(step), out=tmp_path / "out", format=format)
    held = list(_held(compiled, tmp_path / "out", source))
    quantized = {(n, e) for n, e in ((h.name, h.expert) for h in held)}
    rounded = [n for n in compiled.graph.nodes if is_weight_quantize(n)]
    assert quantized == {(parameter_name(n), _expert(n)) for n in rounded}
    return compiled, held


def _max_codes(held: Held) -> tuple[Array, Array]:
    """(bytes of codes, bytes of scales) that the recipe of block maxima gives."""
    amax = float(np.float64(held.scale_2) * 2688)
    scales = reference.max_block_scales(held.source, amax)
    return _codes(held, scales), scales


def _codes(held: Held, scales: Array) -> Array:
    steps = reference.e4m3_decode(scales).astype(np.float32) * held.scale_2
    return reference.pack(reference.quantize_codes(held.source, steps, np.float32))


def _almost(found: Array, wanted: Array) -> None:
    """A divisor is rounded once more than the multiplier that it stands for, which may tip a tie."""
    assert np.mean(found != wanted) < 1e-3


@pytest.mark.parametrize(("family", "format"), FORMS)
def test_the_file_holds_what_a_third_party_s_rounding_packed(
    family: str, format: str, tmp_path: Path
) -> None:
    _, held = _written(family, format, Flip(), tmp_path)
    for own in held:
        codes, scales = _max_codes(own)
        flips = _flips(own.name, own.expert)
        if format == "modelopt":
            assert np.array_equal(own.codes, codes ^ flips), own.name
            assert np.array_equal(own.scales, scales), own.name
        else:
            _almost(own.codes, codes ^ flips)
            _almost(own.scales, scales)


@pytest.mark.parametrize(("family", "format"), FORMS)
def test_the_file_holds_codes_and_scales_that_a_pass_decided(
    family: str, format: str, tmp_path: Path
) -> None:
    _, held = _written(family, format, Decide(), tmp_path)
    for own in held:
        out = sum(len(h.rows) for h in held if (h.name, h.expert) == (own.name, own.expert))
        codes, scales = _decided(own.name, own.expert, (out, own.source.shape[1]))
        rows = slice(own.rows.start, own.rows.stop)
        assert np.array_equal(own.codes, codes.numpy()[rows]), own.name
        assert np.array_equal(own.scales, scales.view(torch.uint8).numpy()[rows]), own.name


def test_experts_of_one_parameter_are_packed_each_by_its_own_option(tmp_path: Path) -> None:
    _, held = _written("qwen3_moe", "modelopt", SearchOdd(), tmp_path)
    searched = 0
    for own in held:
        codes, scales = _max_codes(own)
        if (own.expert or 0) % 2:
            best = reference.search_all(own.source, float(np.float64(own.scale_2) * 2688))
            loss = reference.block_loss(own.source, own.scales, float(np.float64(own.scale_2) * 2688))
            np.testing.assert_allclose(loss, best.loss, rtol=1e-5, atol=1e-12)
            assert np.array_equal(own.codes, _codes(own, own.scales))
            assert not np.array_equal(own.scales, scales)
            searched += 1
        else:
            assert np.array_equal(own.codes, codes)
            assert np.array_equal(own.scales, scales)
    assert searched > 10


@dataclass(frozen=True)
class Compensate(OfWeights):
    """Like GPTQ: what is decided follows from the weight and the gram of what it multiplies."""

    name: ClassVar[str] = "compensate"
    requires: ClassVar[tuple[Any, ...]] = (amaxes_shared,)
    breaks: ClassVar[tuple[Any, ...]] = (amaxes_filled,)
    reads_values: ClassVar[bool] = False

    def run(self, program: Program) -> int:
        grams: dict[object, Node] = {}
        matmuls = list(weight_matmuls(program.graph))
        for matmul in matmuls:
            w, x, graph = strip(matmul.w, VIEWS), matmul.x, program.graph
            if w.target is dialect.STACK:
                ids, count = node_at(matmul.node, 2), shape_of(w)[0]
                if (x, ids) not in grams:
                    made = edit.call(graph, f"{x.name}_grams", dialect.EXPERT_GRAM, x, ids, experts=count)
                    grams[x, ids] = made
                for e, quantize in enumerate(nodes_at(w, 0)):
                    own = edit.call(graph, f"{quantize.name}_gram", dialect.SLICE, grams[x, ids], e)
                    self._round(quantize, own)
            elif w.target is dialect.QUANTIZE:
                if x not in grams:
                    grams[x] = edit.call(graph, f"{x.name}_gram", dialect.GRAM, x)
                self._round(w, grams[x])
        return len(grams)

    def _round(self, quantize: Node, gram: Node) -> None:
        made = f"{quantize.name}_compensated"
        new = edit.call(quantize.graph, made, COMPENSATED, *quantize.args, gram, **quantize.kwargs)
        edit.replace(quantize, new)


def _compensated(t: Tensor, amax: Tensor, gram: Tensor, *, format: str, scale: str) -> nvfp4.Measured:
    """One column after another, the error of each spread over the next by what both have in common."""
    scale_2 = nvfp4.global_scale(amax)
    scales = nvfp4.mse_scales(t, scale_2)
    steps, left = scales.float() * scale_2[:, None, None], t.float().clone()
    found = torch.empty_like(left)
    size = gram.diagonal(dim1=-2, dim2=-1) + 1e-6
    for k in range(t.shape[-1]):
        step = steps[..., k // nvfp4.BLOCK]
        found[..., k] = (left[..., k] / step).round().clamp(-6, 6) * step
        share = gram[:, k, k + 1 :] / size[:, k + 1 :]
        left[..., k + 1 :] += 0.5 * (left[..., k] - found[..., k])[..., None] * share[:, None]
    return nvfp4.decided(t, amax, nvfp4.pack(found, scales, scale_2), scales)


COMPENSATED = dialect.rounding(
    "test_rewritten::compensated(Tensor t, Tensor amax, Tensor gram, *, str format, str scale) -> Tensor",
    pack=_compensated,
)


@dataclass(frozen=True)
class Balance(Pass):
    """Like AWQ: the scale of a norm moves into the linears that read it, by the magnitude of its channels."""

    name: ClassVar[str] = "balance"

    def sites(self, program: Program) -> Iterator[Match]:
        for node in list(program.graph.nodes):
            for scale in node.all_input_nodes if node.target is ATEN.mul.Tensor else ():
                is_vector = scale.op == "get_attr" and len(shape_of(scale)) == 1
                if is_vector and all(user.target is ATEN.linear.default for user in node.users):
                    yield Match("norm", node, {"scale": scale})

    def rewrite(self, site: Match) -> None:
        product, scale, graph = site.node, site["scale"], site.node.graph
        plain = edit.call(graph, f"{product.name}_plain", ATEN.mul.Tensor, *product.args)
        seen = edit.call(graph, f"{product.name}_absmax", dialect.ABSMAX, plain)
        least = edit.call(graph, f"{product.name}_least", ATEN.clamp_min.default, seen, 1e-6)
        by = edit.call(graph, f"{product.name}_by", ATEN.sqrt.default, least)
        readers = list(product.users)
        for w in dict.fromkeys(linear.w for linear in map(as_weight_matmul, readers) if linear is not None):
            scaled = edit.call(graph, f"{w.name}_scaled", ATEN.mul.Tensor, w, by)
            edit.replace(w, edit.call(graph, f"{w.name}_new", dialect.REWRITE, w, scaled), readers)
        less = edit.call(graph, f"{scale.name}_less", ATEN.div.Tensor, scale, by)
        edit.replace(scale, edit.call(graph, f"{scale.name}_new", dialect.REWRITE, scale, less), [product])


def deciding() -> Spec:
    """Statistics of every kind: absmax, grams of linears and of experts behind it, amaxes of all inputs."""
    passes: list[Pass] = [FuseExperts(), Balance(), QuantizeExperts()]
    passes += [QuantizeLinears(), SyncGroups(), Compensate()]
    passes += [CalibrateMax(prefix="quantized"), CalibrateBootstrap(), Lower()]
    return Spec("deciding", "", tuple(passes))


# Compiles in children of a process that has imported all: to the end, and killed at moments of its own, each
# time gone on with. It prints how many changes of the disk a run makes, and how each child ended.
KILLED = """
import json, os, random, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
import fxq
from tests.checkpoint.test_rewritten import deciding
model, calib, root, moments = sys.argv[1:]
def child(out, at, resume):
    read, write = os.pipe()
    if (pid := os.fork()) == 0:
        left = [at]
        def wrap(name):
            plain = getattr(os, name)
            def call(*args, **kwargs):
                left[0] -= 1
                if left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return plain(*args, **kwargs)
            setattr(os, name, call)
        write_plainly = os.write
        for name in ("pwrite", "write", "fsync", "rename", "unlink"):
            wrap(name)
        status = 1
        try:
            options = {"calib": Path(calib), "out": Path(out), "shard_bytes": 20_000}
            fxq.compile(Path(model), deciding(), resume=resume, **options)
            write_plainly(write, str(-left[0]).encode())
            status = 0
        finally:
            os._exit(status)
    os.close(write)
    with os.fdopen(read) as pipe:
        said = pipe.read()
    return os.waitpid(pid, 0)[1], said
status, changes = child(f"{root}/whole", 0, False)
assert status == 0
ends, generator = [], random.Random(int(moments))
for number in range(int(moments)):
    out = f"{root}/out-{number}"
    killed, _ = child(out, generator.randrange(1, int(changes) - 5), False)
    ends.append([killed, os.path.exists(out), child(out, 0, True)[0]])
print(json.dumps([int(changes), ends]))
"""


@pytest.mark.parametrize("moments", [pytest.param(2, marks=SLOW), pytest.param(20, marks=pytest.mark.long)])
def test_a_run_that_decides_by_statistics_and_is_killed_goes_on_to_the_same_bytes(
    moments: int, tmp_path: Path
) -> None:
    head: dict[str, Any] = {"head_dim": 16}
    config = Qwen3MoeConfig(
        **head,
        vocab_size=160,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    model = save(random_model(config), tmp_path / "model")
    calib = write_lines(tmp_path / "calib.jsonl", [{"input_ids": ids} for ids in samples(4)])
    command = [sys.executable, "-c", KILLED, str(model), str(calib), str(tmp_path), str(moments)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, cwd=ROOT)
    changes, ends = json.loads(done.stdout)
    assert changes > 50
    assert ends == [[9, False, 0]] * moments
    whole = _files(tmp_path / "whole")
    report = json.loads(whole["fxq-report/report.json"])
    assert report["rewritten"]
    for number in range(moments):
        assert _files(tmp_path / f"out-{number}") == whole, number
    assert not list(tmp_path.glob(".*"))


def _files(directory: Path) -> dict[str, bytes]:
    files = {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}
    return without_times(files)


@pytest.mark.parametrize(
    "spec",
    [
        pytest.param(spec, marks=() if spec == "nvfp4_default-fp8_kv" else SLOW)
        for spec in (*shipped(), "deciding")
        if "cast_mxfp4" not in spec and "blocks_kept" not in spec  # of sources that hold these formats
    ],
)
def test_each_byte_of_the_source_is_read_once(spec: str, zoo: Zoo, tmp_path: Path) -> None:
    """Learning reads it before it is written (the norms, which it decides, not again); choosing formats to
    measure, and to check what was chosen."""
    times = 3 if "auto" in spec else 2 if "learned" in spec else 1
    source = zoo("qwen3_moe")
    chosen = deciding() if spec == "deciding" else spec
    calib = None if spec in ("nvfp4_weight_only", "nvfp4_weight_only_mse") else samples(4)
    fxq.compile(source, chosen, calib=calib, out=tmp_path / "out")
    report = json.loads((tmp_path / "out" / "fxq-report" / "report.json").read_text())
    read, held = report["measured"]["source_bytes_read"], report["summary"]["source_bytes"]
    assert read == held > 0 if times == 1 else 0.99 * times * held < read <= times * held
