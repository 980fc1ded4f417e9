"""Writing: shards, side files, and an output that is there whole or not at all."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer, GenerationConfig

import fxq
from fxq.checkpoint.formats import Scheme, modelopt
from fxq.checkpoint.plan import plan
from fxq.checkpoint.shards import Shards
from fxq.graph.hub import TensorInfo
from fxq.graph.program import Program
from fxq.graph.text import parse
from fxq.graph.verify import verify
from fxq.model import open_model
from fxq.sources.safetensors_file import SafetensorsFile
from tests import oracle, reader, tiny
from tests.families import Zoo, load, samples, zoo

__all__ = ["zoo"]

WEIGHT_ONLY = "nvfp4_weight_only"
GENERATION = '{"do_sample": false,   "temperature": 0.6, "top_p": 0.95, "eos_token_id": [1, 2]}\n'


@pytest.fixture(scope="module")
def source(zoo: Zoo, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen3-MoE directory with everything that hub directories have around the weights."""
    path = Path(shutil.copytree(zoo("qwen3_moe"), tmp_path_factory.mktemp("source") / "model"))
    (path / "generation_config.json").write_text(GENERATION)
    (path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    (path / "chat_template.jinja").write_text("{{ messages }}\n")
    (path / "additional_chat_templates").mkdir()
    (path / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}\n")
    (path / "modeling_mine.py").write_text("raise RuntimeError('never run')\n")
    (path / "README.md").write_text("# mine\n")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "my_own_key": {"kept": [1, 2.5, None]}}))
    return path


@pytest.fixture(scope="module")
def compiled(source: Path) -> fxq.Compiled:
    return fxq.compile(source, WEIGHT_ONLY)


@pytest.fixture(scope="module")
def out(compiled: fxq.Compiled, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("out") / "model"
    compiled.save(path)
    return path


def test_the_output_keeps_the_contract(out: Path, source: Path) -> None:
    assert reader.check(out, source) == []


SIDE_FILES = ["tokenizer_config.json", "chat_template.jinja", "modeling_mine.py"]


@pytest.mark.parametrize("name", [*SIDE_FILES, "additional_chat_templates/tools.jinja"])
def test_side_files_are_copied_byte_for_byte(name: str, out: Path, source: Path) -> None:
    assert (out / name).read_bytes() == (source / name).read_bytes()


def test_a_generation_config_that_transformers_would_not_save_samples_in_the_output(
    source: Path, compiled: fxq.Compiled, out: Path, tmp_path: Path
) -> None:
    loaded = GenerationConfig.from_pretrained(out)
    loaded.validate(strict=True)
    loaded.save_pretrained(tmp_path)
    assert (loaded.do_sample, loaded.temperature, loaded.top_p, loaded.eos_token_id) == (
        True,
        0.6,
        0.95,
        [1, 2],
    )
    assert (source / "generation_config.json").read_text() == GENERATION
    assert [w for w in compiled.report.warnings if "generation_config.json" in w and "do_sample" in w]
    assert any("do_sample" in w for w in json.loads((out / "fxq-report/report.json").read_text())["warnings"])


def test_the_same_of_a_live_model(source: Path, tmp_path: Path) -> None:
    model = load(source)
    before = copy.deepcopy(model.generation_config)
    fxq.compile(model, WEIGHT_ONLY, out=tmp_path / "out")
    GenerationConfig.from_pretrained(tmp_path / "out").validate(strict=True)
    assert model.generation_config == before
    assert (source / "generation_config.json").read_text() == GENERATION


@pytest.mark.parametrize(
    "content",
    [
        '{"do_sample": true,  "temperature": 0.6}',
        '{"eos_token_id": 2}',
        "[1]",
        "not JSON",
        '{"do_sample": false, "temperature": 0.6, "num_return_sequences": -1, "max_new_tokens": 0}',
    ],
)
def test_any_other_generation_config_is_copied_byte_by_byte(content: str, zoo: Zoo, tmp_path: Path) -> None:
    model = Path(shutil.copytree(zoo("llama"), tmp_path / "model"))
    (model / "generation_config.json").write_text(content)
    assert open_model(model).replaced_files() == ({}, [])


def test_unknown_keys_of_the_config_survive(out: Path, source: Path) -> None:
    ours, theirs = (json.loads((p / "config.json").read_text()) for p in (out, source))
    assert ours.pop("quantization_config")["quant_method"] == "modelopt"
    assert ours == theirs


def test_weights_of_the_source_are_not_copied(source: Path, compiled: fxq.Compiled, tmp_path: Path) -> None:
    for name in ("pytorch_model.bin", "model.safetensors.index.json.bak", "old.gguf", ".hidden"):
        (source / name).write_text("{}")
    try:
        compiled.save(tmp_path / "out")
        names = {path.name for path in (tmp_path / "out").iterdir()}
        assert not names & {"pytorch_model.bin", "old.gguf", ".hidden"}
        assert [p.name for p in (tmp_path / "out").glob("*.safetensors")] == ["model.safetensors"]
    finally:
        for name in ("pytorch_model.bin", "model.safetensors.index.json.bak", "old.gguf", ".hidden"):
            (source / name).unlink()


@pytest.mark.parametrize("shard_bytes", [1, 5_000, 40_000])
def test_shards_hold_the_same_tensors(
    shard_bytes: int, compiled: fxq.Compiled, out: Path, source: Path, tmp_path: Path
) -> None:
    compiled.save(tmp_path / "sharded", shard_bytes=shard_bytes)
    shards = sorted(p.name for p in (tmp_path / "sharded").glob("*.safetensors"))
    assert len(shards) > 2
    assert shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    assert reader.check(tmp_path / "sharded", source) == []
    ours, theirs = reader.read_checkpoint(tmp_path / "sharded"), reader.read_checkpoint(out)
    assert set(ours.tensors) == set(theirs.tensors)
    for name in theirs.tensors:
        assert ours.raw(name).tobytes() == theirs.raw(name).tobytes(), name
    largest = max(e.size for e in theirs.tensors.values()) * 2
    for shard in shards:
        assert (tmp_path / "sharded" / shard).stat().st_size <= shard_bytes + largest + 20_000


def test_sharding_keeps_a_linear_s_tensors_together(compiled: fxq.Compiled, tmp_path: Path) -> None:
    compiled.save(tmp_path / "sharded", shard_bytes=5_000)
    checkpoint = reader.read_checkpoint(tmp_path / "sharded")
    for name in checkpoint.quantized_linears():
        parts = ("weight", "weight_scale", "weight_scale_2")
        assert len({checkpoint.tensors[f"{name}.{part}"].shard for part in parts}) == 1


def test_an_empty_directory_is_filled_and_a_deep_one_made(compiled: fxq.Compiled, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    compiled.save(tmp_path / "empty")
    compiled.save(tmp_path / "a" / "b" / "c")
    for path in (tmp_path / "empty", tmp_path / "a" / "b" / "c"):
        assert (path / "model.safetensors").is_file()
    assert {p.name for p in tmp_path.iterdir()} == {"empty", "a"}


def test_files_are_readable_as_any_other(out: Path, tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "file").write_text("x")
    assert out.stat().st_mode == (tmp_path / "plain").stat().st_mode
    for path in out.iterdir():
        if path.is_file():
            assert path.stat().st_mode == (tmp_path / "plain" / "file").stat().st_mode, path.name


def test_a_second_save_into_the_same_place_is_refused_and_harms_nothing(
    compiled: fxq.Compiled, tmp_path: Path
) -> None:
    compiled.save(tmp_path / "out")
    before = {p: p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()}
    with pytest.raises(fxq.CheckpointError, match="empty"):
        compiled.save(tmp_path / "out")
    assert {p: p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()} == before


@pytest.mark.parametrize("inside", ["", "sub", "sub/sub"])
def test_saving_into_the_model_is_refused(inside: str, compiled: fxq.Compiled, source: Path) -> None:
    before = sorted(source.rglob("*"))
    with pytest.raises(fxq.CheckpointError):
        compiled.save(source / inside)
    assert sorted(source.rglob("*")) == before


Fail = Callable[[int, BaseException], None]


@pytest.fixture
def fail(monkeypatch: pytest.MonkeyPatch) -> Fail:
    """Makes the n-th read from a file raise."""

    def arm(count: int, error: BaseException) -> None:
        reads = iter(range(1, 1_000_000))
        plain = SafetensorsFile.read

        def read(self: SafetensorsFile, key: str, out: Tensor, start: int = 0) -> None:
            if next(reads) == count:
                raise error
            plain(self, key, out, start)

        monkeypatch.setattr(SafetensorsFile, "read", read)

    return arm


@pytest.mark.parametrize("count", [1, 10, 40])
def test_an_error_in_the_middle_leaves_nothing_behind(
    count: int, compiled: fxq.Compiled, tmp_path: Path, fail: Fail
) -> None:
    (tmp_path / "neighbour").write_text("keep me")
    fail(count, fxq.SourceError("disk gone"))
    with pytest.raises(fxq.SourceError):
        compiled.save(tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["neighbour"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), MemoryError()], ids=lambda e: type(e).__name__)
def test_an_interrupted_save_is_resumed(
    error: BaseException, compiled: fxq.Compiled, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writes, plain = iter(range(1, 1_000_000)), Shards.write

    def write(self: Shards, *args: Any) -> int:
        if next(writes) == 40:
            raise error
        return plain(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Shards, "write", write)
        with pytest.raises(type(error)):
            compiled.save(tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == [".out.partial"]
    compiled.save(tmp_path / "out", resume=True)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_failure_in_the_middle_leaves_an_empty_directory_empty(
    compiled: fxq.Compiled, tmp_path: Path, fail: Fail
) -> None:
    (tmp_path / "out").mkdir()
    fail(10, fxq.SourceError("disk gone"))
    with pytest.raises(fxq.SourceError, match="disk gone"):
        compiled.save(tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert not list((tmp_path / "out").iterdir())


def test_saving_works_after_a_failure(
    compiled: fxq.Compiled, out: Path, tmp_path: Path, fail: Fail, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail(10, fxq.SourceError("disk gone"))
    with pytest.raises(fxq.SourceError):
        compiled.save(tmp_path / "out")
    monkeypatch.undo()
    compiled.save(tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()


def test_writing_never_changes_the_source(compiled: fxq.Compiled, source: Path, tmp_path: Path) -> None:
    before = {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in source.rglob("*")}
    compiled.save(tmp_path / "out")
    assert {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in source.rglob("*")} == before


@pytest.mark.slow
def test_a_spec_that_does_not_lower_has_nothing_to_write(zoo: Zoo, tmp_path: Path) -> None:
    (tmp_path / "graph_only.yaml").write_text("passes:\n  - fuse-experts\n")
    compiled = fxq.compile(zoo("qwen3_moe"), tmp_path / "graph_only.yaml")
    with pytest.raises(fxq.CheckpointError, match="lower"):
        compiled.save(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_output_is_a_source_that_loses_little_more(out: Path, tmp_path: Path) -> None:
    fxq.compile(out, WEIGHT_ONLY, out=tmp_path / "again")
    first, again = (reader.read_checkpoint(path) for path in (out, tmp_path / "again"))
    assert first.quantized_linears() == again.quantized_linears()
    for name in first.quantized_linears():
        once, twice = first.dequantize(name), again.dequantize(name)
        assert ((twice - once) ** 2).sum() < 0.02 * (once**2).sum()


@pytest.mark.slow
def test_the_tokenizer_of_the_output_loads(zoo: Zoo, tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    path = Path(shutil.copytree(zoo("llama"), tmp_path / "model"))
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "hello": 7, "world": 8}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(path)
    compiled = fxq.compile(path, "nvfp4_default-fp8_kv", calib=["hello world hello"], out=tmp_path / "out")
    assert compiled.report.calibration_tokens == 3
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("world hello")["input_ids"] == [8, 7]
    live = fxq.compile(load(path), "nvfp4_default-fp8_kv", calib=[{"text": "hello world hello"}])
    assert all(torch.equal(live.scales[n], v) for n, v in compiled.scales.items())


FORMS = {family.name: family for family in tiny.families()}
SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("family", "fused"),
    [
        ("gpt_oss", True),
        ("granitemoe", True),
        ("hrm_text", False),
        ("gpt2", False),
        pytest.param("llama4_text", True, marks=SLOW),
        pytest.param("jetmoe", True, marks=SLOW),
    ],
)
def test_every_storage_form_is_written_as_the_hub_holds_it(family: str, fused: bool, tmp_path: Path) -> None:
    tiny.tiny_model(FORMS[family]).save_pretrained(tmp_path / "model")
    spec = "nvfp4_default-fp8_cast_kv"
    compiled = fxq.compile(
        tmp_path / "model", spec, calib=[ids[:16] for ids in samples(3)], out=tmp_path / "out"
    )
    assert reader.check(tmp_path / "out", tmp_path / "model") == []
    notes = [note for note in compiled.program.notes if "all experts of a layer in one tensor" in note]
    assert len(notes) == fused
    written = load(oracle.dequantized_model(tmp_path / "out", tmp_path / "dequantized"))
    for name, tensor in load(tmp_path / "model").state_dict().items():
        ours = written.state_dict()[name]
        assert ours.shape == tensor.shape
        assert float((ours - tensor).square().sum()) <= 0.1 * float(tensor.square().sum()), name


@pytest.fixture(scope="module")
def fused(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model whose experts are [E, in, out] in one tensor, and what is made of it."""
    path = tmp_path_factory.mktemp("fused")
    tiny.tiny_model(FORMS["gpt_oss"]).save_pretrained(path / "model")
    fxq.compile(path / "model", WEIGHT_ONLY, out=path / "out")
    return path / "model", path / "out"


EXPERTS = "model.layers.0.mlp.experts.down_proj"


def test_fused_experts_have_the_tensors_of_the_contract(fused: tuple[Path, Path]) -> None:
    source, out = (reader.read_checkpoint(path).tensors for path in fused)
    experts, inner, hidden = source[EXPERTS].shape
    found = {name: (e.dtype, e.shape) for name, e in out.items() if name.startswith(EXPERTS)}
    assert found == {
        EXPERTS: ("U8", (experts, inner // 2, hidden)),
        f"{EXPERTS}_weight_scale": ("F8_E4M3", (experts, inner // 16, hidden)),
        f"{EXPERTS}_weight_scale_2": ("F32", ()),
        f"{EXPERTS}_bias": ("BF16", (experts, hidden)),
    }


Tensors = dict[str, Tensor]


def _forgotten(tensors: Tensors) -> None:
    tensors[EXPERTS][5] = 0


def _turned(tensors: Tensors) -> None:
    tensors[EXPERTS] = tensors[EXPERTS].mT.contiguous()


def _swapped(tensors: Tensors) -> None:
    tensors[EXPERTS] = tensors[EXPERTS].roll(1, 0)


def _scalars(tensors: Tensors) -> None:
    name = f"{EXPERTS}_weight_scale_2"
    tensors[name] = tensors[name].expand(8).contiguous()


def _zero_scale(tensors: Tensors) -> None:
    tensors[f"{EXPERTS}_weight_scale"].view(torch.uint8)[3, 0, 0] = 0


def _lost(tensors: Tensors) -> None:
    del tensors[f"{EXPERTS}_weight_scale"]


def _too_few(tensors: Tensors) -> None:
    for name in (EXPERTS, f"{EXPERTS}_weight_scale"):
        tensors[name] = tensors[name][:7].clone()


@pytest.mark.parametrize("harm", [_forgotten, _turned, _swapped, _scalars, _zero_scale, _lost, _too_few])
def test_the_reader_sees_harm_done_to_fused_experts(
    harm: Callable[[Tensors], None], fused: tuple[Path, Path], tmp_path: Path
) -> None:
    source, out = fused
    broken = Path(shutil.copytree(out, tmp_path / "broken"))
    tensors = load_file(broken / "model.safetensors")
    harm(tensors)
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    assert any(EXPERTS in finding for finding in reader.check(broken, source))


@SLOW
def test_a_quantized_block_that_layers_share_is_not_listed_under_its_other_names(tmp_path: Path) -> None:
    tiny.tiny_model(FORMS["zamba2"]).save_pretrained(tmp_path / "model")
    fxq.compile(tmp_path / "model", WEIGHT_ONLY, out=tmp_path / "out")
    assert reader.check(tmp_path / "out", tmp_path / "model") == []


def test_fused_experts_left_out_are_listed(fused: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "attention.yaml").write_text(
        "passes:\n"
        "  - fuse-experts\n"
        "  - quantize-linears: {only: ['*self_attn*'], weights: nvfp4, inputs: none}\n"
        "  - sync-groups\n  - calibrate-bootstrap\n  - lower\n"
    )
    fxq.compile(fused[0], tmp_path / "attention.yaml", out=tmp_path / "out")
    assert reader.check(tmp_path / "out", fused[0]) == []
    listed = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]["ignore"]
    assert {EXPERTS, "model.layers.0.mlp.experts", "model.layers.0.mlp.router"} <= set(listed)


def test_rows_are_written_in_place_once_and_all(tmp_path: Path) -> None:
    values = torch.arange(2 * 6 * 4, dtype=torch.bfloat16).reshape(2, 6, 4)
    infos = {"w": TensorInfo((2, 6, 4), torch.bfloat16)}
    shards = Shards(tmp_path, infos, 1 << 20)
    shards.open()
    blocks = []
    for expert, rows in ((1, range(0, 6, 2)), (0, range(2, 6)), (1, range(1, 6, 2))):
        part = values[expert, rows.start : rows.stop : rows.step]
        blocks.append(shards.rows("w", part, rows, expert=expert, experts=2))
    with pytest.raises(fxq.CheckpointError, match="w: planned but not fully written"):
        shards.finish()
    blocks.append(shards.rows("w", values[0, :2], range(2), expert=0, experts=2))
    with pytest.raises(fxq.CheckpointError, match="more than once"):
        shards.rows("w", values[0, :2], range(2), expert=0, experts=2)
    with pytest.raises(fxq.CheckpointError, match="expected"):
        shards.rows("w", values[0, :2], range(5, 7), expert=0, experts=2)
    for block in blocks:
        assert shards.write(block) == shards.checksum(block.span)
    shards.finish()
    shards.close()
    assert torch.equal(load_file(tmp_path / "model.safetensors.part")["w"], values)


TWO_EXPERTS = """\
%a : f32[] = fxq.value('a')
%w0 : bf16[16,32] = @w0
%p0 : [u8[16,16], f8e4m3[16,2], f32[]] = fxq.pack(%w0, %a, format='nvfp4', scale='max')
%s0 : none = fxq.store_rows('w', %p0, None, start=0, end=16, rows=[0, 16, 1], shape=[2, 16, 32], expert=0, \
experts=2, transposed=False)
%w1 : bf16[16,32] = @w1
%p1 : [u8[16,16], f8e4m3[16,2], f32[]] = fxq.pack(%w1, %a, format='nvfp4', scale='max')
%s1 : none = fxq.store_rows('w', %p1, None, start=0, end=16, rows=[0, 16, 1], shape=[2, 16, 32], expert=1, \
experts=2, transposed=False)
return ()
"""


def test_rows_of_a_tensor_are_planned_as_one() -> None:
    graph = parse(TWO_EXPERTS)
    verify(graph)
    found = plan(Program(graph), modelopt)
    assert {name: info.shape for name, info in found.infos.items()} == {
        "w": (2, 16, 16),
        "w_weight_scale": (2, 16, 2),
        "w_weight_scale_2": (),
    }
    assert found.linears == {"w": Scheme("nvfp4", inputs=False)}


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("expert=1", "expert=0", "stores rows that are stored already"),
        ("end=16, rows=[0, 16, 1]", "end=8, rows=[0, 16, 2]", "nothing stores row 1 of expert"),
        ("shape=[2, 16, 32], expert=1", "shape=[2, 32, 32], expert=1", "stores into shape"),
    ],
)
def test_rows_missing_or_stored_twice_are_refused(old: str, new: str, message: str) -> None:
    with pytest.raises(fxq.CheckpointError, match=message):
        plan(Program(parse(TWO_EXPERTS.replace(old, new))), modelopt)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("expert=1", "expert=2", "expert index is out of range"),
        ("rows=[0, 16, 1]", "rows=[0, 8, 1]", "as many rows"),
        ("rows=[0, 16, 1]", "rows=[1, 17, 1]", "outside of the tensor"),
        ("shape=[2, 16, 32]", "shape=[2, 16, 64]", "outside of the tensor"),
        ("transposed=False", "transposed=True", "outside of the tensor"),
    ],
)
def test_rows_that_do_not_fit_are_no_valid_program(old: str, new: str, message: str) -> None:
    with pytest.raises(fxq.VerifyError, match=message):
        verify(parse(TWO_EXPERTS.replace(old, new)))
