"""A directory and a live model hold the same tensors, and what a directory gets wrong is named."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel, conversion_mapping
from transformers.core_model_loading import (
    Chunk,
    ConversionOps,
    Interleave,
    PermuteForRope,
    WeightConverter,
)

import fxq
from fxq.graph.hub import Part
from fxq.sources import Directory, Live
from fxq.sources.safetensors_file import SafetensorsFile
from tests import reader, tiny
from tests.families import (
    EXPERTS,
    FAMILIES,
    HIDDEN,
    MOE,
    MOE_LAYERS,
    Zoo,
    add_tensors,
    drop_tensors,
    load,
    random_model,
    zoo,
)

__all__ = ["zoo"]

FORMS = {family.name: family for family in tiny.families()}
# Fused in both orientations, a matrix of experts, rows of a shared tensor, Conv1D, joined convolutions,
# separate fused gate and up, experts split by modality, rotary permutations of a vision tower.
STORAGE_FORMS = [
    "gpt_oss",
    "llama4_text",
    "granitemoe",
    "jetmoe",
    "dbrx",
    "hrm_text",
    "gpt2",
    "kimi_linear",
    "qwen3_5_moe",
    "step3p7/Step3p7ForConditionalGeneration",
    "ernie4_5_vl_moe/Ernie4_5_VLMoeForConditionalGeneration",
    "kimi_k25/Kimi_K25ForConditionalGeneration",
]
VL_MOE = "qwen3_vl_moe/Qwen3VLMoeForConditionalGeneration"


def _directory(path: Path, model: PreTrainedModel) -> Directory:
    directory = Directory(path)
    directory.attach(model)
    return directory


def _fused(model: PreTrainedModel) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.dim() == 3]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_directory_and_a_live_model_read_alike(family: str, zoo: Zoo) -> None:
    model = load(zoo(family))
    directory, live = _directory(zoo(family), model), Live(model)
    assert set(directory.hub.stored) == set(live.hub.stored) >= {n for n, _ in model.named_parameters()}
    for name, parameter in model.named_parameters():
        assert torch.equal(directory.read(name), parameter.detach()), name
        assert torch.equal(live.read(name), parameter.detach()), name
    for name in _fused(model):
        for expert in range(EXPERTS):
            wanted = model.get_parameter(name)[expert]
            assert torch.equal(directory.read_expert(name, expert), wanted)
            assert torch.equal(live.read_expert(name, expert), wanted)
    for key in live.hub.tensors:
        assert torch.equal(live.read_hub(key), directory.read_hub(key)), key


@pytest.mark.parametrize("family", FAMILIES)
def test_hub_names_are_those_of_the_files(family: str, zoo: Zoo) -> None:
    stored = load_file(zoo(family) / "model.safetensors")
    model = load(zoo(family))
    directory = _directory(zoo(family), model)
    assert set(directory.hub.tensors) == set(stored)
    for key, tensor in stored.items():
        info = directory.hub.tensors[key]
        assert (info.shape, info.dtype) == (tuple(tensor.shape), tensor.dtype)
        assert torch.equal(directory.read_hub(key), tensor)
    assert set(Live(model).hub.tensors) == set(stored) - set(directory.hub.extra)


def test_extra_tensors_of_a_live_model_come_from_its_directory(zoo: Zoo) -> None:
    model, origin = load(zoo("deepseek_v3")), Directory(zoo("deepseek_v3"))
    live = Live(model, origin)
    assert set(live.hub.tensors) == set(origin.infos)
    extra = set(live.hub.extra)
    assert len(extra) == 3 + 3 * EXPERTS + 2
    assert all(key.startswith("model.layers.3.") for key in extra)
    for key in extra:
        assert torch.equal(live.read_hub(key), origin.read_hub(key))


def test_a_live_model_s_own_values_win_over_its_directory(zoo: Zoo) -> None:
    model = load(zoo("qwen3_moe"))
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj[3].fill_(0.5)
    live = Live(model, Directory(zoo("qwen3_moe")))
    assert (live.read_hub("model.layers.1.mlp.experts.3.down_proj.weight") == 0.5).all()
    assert (live.read_expert("model.layers.1.mlp.experts.down_proj", 3) == 0.5).all()


@pytest.mark.parametrize("family", MOE)
def test_experts_map_to_their_own_tensors_gate_before_up(family: str, zoo: Zoo) -> None:
    model = load(zoo(family))
    directory = _directory(zoo(family), model)
    fused = _fused(model)
    assert len(fused) == 2 * MOE_LAYERS[family]
    for name in fused:
        stored = directory.hub.stored[name]
        assert stored.stacked
        assert [len(part) for part in stored.keys] == [EXPERTS] * (2 if "gate_up" in name else 1)
        for expert in range(EXPERTS):
            assert all(f".experts.{expert}." in part[expert] for part in stored.keys)
        whole = torch.cat([directory.read_hub(part[2]) for part in stored.keys])
        assert torch.equal(whole, model.get_parameter(name)[2])


def test_more_than_ten_experts_keep_their_numeric_order(tmp_path: Path) -> None:
    config = FAMILIES["mixtral"]()
    config.num_local_experts = 12
    random_model(config).save_pretrained(tmp_path / "model")
    model = load(tmp_path / "model")
    directory = _directory(tmp_path / "model", model)
    for name in _fused(model):
        for expert in range(12):
            assert torch.equal(directory.read_expert(name, expert), model.get_parameter(name)[expert])


@pytest.mark.parametrize("family", ["qwen3_moe", "llama_tied"])
def test_sharded_checkpoints_read_alike(family: str, zoo: Zoo, tmp_path: Path) -> None:
    model = load(zoo(family))
    model.save_pretrained(tmp_path / "sharded", max_shard_size="60KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    directory = _directory(tmp_path / "sharded", model)
    for name, parameter in model.named_parameters():
        assert torch.equal(directory.read(name), parameter.detach()), name


def _fuse_experts(path: Path) -> dict[str, Tensor]:
    """Rewrite a Qwen3-MoE checkpoint so that each layer's experts are stored in one piece, as in memory."""
    tensors = load_file(path / "model.safetensors")
    model = load(path)
    kept = {key: tensor for key, tensor in tensors.items() if ".experts." not in key}
    fused = {name: model.get_parameter(name).detach().clone() for name in _fused(model)}
    save_file({**kept, **fused}, path / "model.safetensors", metadata={"format": "pt"})
    return tensors


def test_experts_stored_in_one_piece_are_read_slice_by_slice(zoo: Zoo, tmp_path: Path) -> None:
    path = Path(shutil.copytree(zoo("qwen3_moe"), tmp_path / "fused"))
    tensors = _fuse_experts(path)
    model = load(zoo("qwen3_moe"))
    directory = _directory(path, model)
    for name in _fused(model):
        assert not directory.hub.stored[name].stacked
        assert torch.equal(directory.read(name), model.get_parameter(name).detach())
        for expert in range(EXPERTS):
            assert torch.equal(directory.read_expert(name, expert), model.get_parameter(name)[expert])
    names = {k for s in directory.hub.names.values() for part in s.keys for k in part}
    assert names >= {key for key in tensors if ".experts." in key}


@pytest.mark.slow
def test_experts_stored_in_one_piece_are_written_one_by_one(zoo: Zoo, tmp_path: Path) -> None:
    path = Path(shutil.copytree(zoo("qwen3_moe"), tmp_path / "fused"))
    _fuse_experts(path)
    for source, out in ((path, "from_fused"), (zoo("qwen3_moe"), "from_single")):
        fxq.compile(source, "nvfp4_weight_only", out=tmp_path / out)
    ours, theirs = (reader.read_checkpoint(tmp_path / out) for out in ("from_fused", "from_single"))
    assert reader.check(tmp_path / "from_fused") == []
    assert set(ours.tensors) == set(theirs.tensors)
    for name in theirs.tensors:
        assert ours.raw(name).tobytes() == theirs.raw(name).tobytes(), name


Reads = list[tuple[str, int]]


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Reads:
    """(tensor, bytes) of every read from a file, as they happen."""
    seen: Reads = []
    plain = SafetensorsFile.read

    def read(self: SafetensorsFile, key: str, out: Tensor, start: int = 0) -> None:
        seen.append((key, out.nbytes))
        plain(self, key, out, start)

    monkeypatch.setattr(SafetensorsFile, "read", read)
    return seen


def test_read_expert_reads_no_other_expert(zoo: Zoo, reads: Reads) -> None:
    directory = _directory(zoo("qwen3_moe"), load(zoo("qwen3_moe")))
    directory.read_expert("model.layers.0.mlp.experts.gate_up_proj", 6)
    assert reads == [
        (f"model.layers.0.mlp.experts.6.{p}_proj.weight", 32 * HIDDEN * 2) for p in ("gate", "up")
    ]


def _equal_to(model: PreTrainedModel, directory: Directory) -> None:
    """Every parameter, whole and by expert, is what transformers loaded."""
    for name, tensor in model.state_dict().items():
        if name in directory.hub.stored:
            assert torch.equal(directory.read(name), tensor), name
            if tensor.dim() == 3:
                for expert in {0, len(tensor) // 2, len(tensor) - 1}:
                    assert torch.equal(directory.read_expert(name, expert), tensor[expert]), name
        else:
            assert name in model.all_tied_weights_keys


@pytest.mark.parametrize("family", STORAGE_FORMS)
def test_every_storage_form_is_read_as_transformers_loads_it(family: str, tmp_path: Path) -> None:
    made = tiny.tiny_model(FORMS[family])
    made.save_pretrained(tmp_path / "model")
    model = type(made).from_pretrained(tmp_path / "model", dtype=torch.bfloat16)
    directory = _directory(tmp_path / "model", model)
    _equal_to(model, directory)
    for live in (Live(model), Live(model, Directory(tmp_path / "model"))):
        assert set(live.hub.tensors) == set(directory.infos)
        for key, info in directory.infos.items():
            if info.dtype == torch.bfloat16:  # transformers rounds the others as it loads them
                assert torch.equal(live.read_hub(key), directory.read_hub(key)), key


@pytest.fixture
def vl_moe(tmp_path: Path) -> tuple[Path, PreTrainedModel]:
    """A model whose hub checkpoint holds experts as [E, in, out] (`save_pretrained` writes [E, out, in])."""
    made = tiny.tiny_model(FORMS[VL_MOE])
    made.save_pretrained(tmp_path / "model")
    turned = {
        k: t.mT.contiguous()
        for k, t in load_file(tmp_path / "model/model.safetensors").items()
        if ".experts." in k
    }
    add_tensors(tmp_path / "model", turned)
    return tmp_path / "model", type(made).from_pretrained(tmp_path / "model", dtype=torch.bfloat16)


def test_experts_that_the_hub_holds_transposed_are_turned_by_shape(
    vl_moe: tuple[Path, PreTrainedModel],
) -> None:
    path, model = vl_moe
    directory = _directory(path, model)
    _equal_to(model, directory)
    down = [s for n, s in directory.hub.stored.items() if n.endswith("experts.down_proj")]
    assert down
    assert all(stored.transposed for stored in down)
    live = Live(model, Directory(path))
    for key in directory.infos:
        assert torch.equal(live.read_hub(key), directory.read_hub(key)), key


@pytest.mark.parametrize("family", ["gpt_oss", "granitemoe"])
def test_an_expert_of_a_fused_tensor_is_read_alone(family: str, tmp_path: Path, reads: Reads) -> None:
    model = tiny.tiny_model(FORMS[family])
    model.save_pretrained(tmp_path / "model")
    directory = _directory(tmp_path / "model", model)
    for name in _fused(model):
        reads.clear()
        assert torch.equal(directory.read_expert(name, 1), model.get_parameter(name)[1])
        assert sum(size for _, size in reads) == model.get_parameter(name)[1].nbytes


Conversions = Callable[[str, list[WeightConverter]], None]


@pytest.fixture
def conversions(monkeypatch: pytest.MonkeyPatch) -> Conversions:
    """Lets transformers load and save a class by other conversions, until the test ends."""
    conversion_mapping.get_checkpoint_conversion_mapping("llama")
    cache: dict[str, Any] = dict(conversion_mapping._checkpoint_conversion_mapping_cache or {})
    monkeypatch.setattr(conversion_mapping, "_checkpoint_conversion_mapping_cache", cache)
    return cache.__setitem__


def test_interleaved_rows_of_one_tensor_are_read_and_named_apart(
    conversions: Conversions, tmp_path: Path
) -> None:
    joined = WeightConverter(
        "mlp.w13.weight",
        ["mlp.gate_proj.weight", "mlp.up_proj.weight"],
        [Interleave(dim=0), Chunk(dim=0)],
    )
    conversions("LlamaForCausalLM", [joined])
    random_model(FAMILIES["llama"]()).save_pretrained(tmp_path / "model")
    model = load(tmp_path / "model")
    directory = _directory(tmp_path / "model", model)
    _equal_to(model, directory)
    key = "model.layers.1.mlp.w13.weight"
    assert directory.hub.stored["model.layers.1.mlp.gate_proj.weight"].parts == (
        Part((key,), range(0, 192, 2)),
    )
    assert directory.hub.stored["model.layers.1.mlp.up_proj.weight"].parts == (
        Part((key,), range(1, 192, 2)),
    )
    assert torch.equal(Live(model).read_hub(key), directory.read_hub(key))


def test_rows_in_another_order_are_read_and_named(conversions: Conversions, tmp_path: Path) -> None:
    permuted = PermuteForRope(permute_layer_names=["q_proj"])
    conversions(
        "LlamaForCausalLM",
        [WeightConverter("self_attn.q_proj.weight", "self_attn.q_proj.weight", [permuted])],
    )
    random_model(FAMILIES["llama"]()).save_pretrained(tmp_path / "model")
    model = load(tmp_path / "model")
    directory = _directory(tmp_path / "model", model)
    name = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(directory.read_hub(name), model.get_parameter(name))
    _equal_to(model, directory)
    assert torch.equal(Live(model).read_hub(name), directory.read_hub(name))
    assert directory.hub.stored[name].parts[:2] == (
        Part((name,), range(0, 16, 2)),
        Part((name,), range(1, 16, 2)),
    )


class HalvesSwapped(ConversionOps):
    """Swaps the halves of each row, which no choice of rows does."""

    @property
    def reverse_op(self) -> ConversionOps:
        return self

    def convert(
        self, input_dict: dict[str, Any], source_patterns: Any, target_patterns: Any, **kwargs: Any
    ) -> dict[str, Any]:
        return {name: t[0].roll(t[0].shape[-1] // 2, -1) for name, t in input_dict.items()}


def test_what_is_more_than_rows_is_converted_by_transformers(
    conversions: Conversions, tmp_path: Path
) -> None:
    q = "self_attn.q_proj.weight"
    conversions("LlamaForCausalLM", [WeightConverter(q, q, [HalvesSwapped()])])
    random_model(FAMILIES["llama"]()).save_pretrained(tmp_path / "model")
    model = load(tmp_path / "model")
    directory = _directory(tmp_path / "model", model)
    name = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(directory.read_hub(name), model.get_parameter(name))
    _equal_to(model, directory)
    assert torch.equal(Live(model).read_hub(name), directory.read_hub(name))
    convert = directory.hub.stored[name].convert
    assert convert is not None
    assert convert.operations == "HalvesSwapped"
    with pytest.raises(fxq.VerifyError, match=r"q_proj\.weight is made of .* by HalvesSwapped"):
        fxq.compile(tmp_path / "model", "nvfp4_weight_only")


def test_a_tied_head_has_no_tensor_of_its_own_but_is_a_module(zoo: Zoo) -> None:
    model = load(zoo("llama_tied"))
    directory = _directory(zoo("llama_tied"), model)
    assert "lm_head.weight" not in Live(model).hub.tensors
    assert "lm_head.weight" not in directory.hub.tensors
    assert "lm_head" in directory.hub.modules
    assert "lm_head" in Live(model).hub.modules


def test_a_checkpoint_of_the_base_model_alone_lends_its_tensors_to_the_prefix(
    zoo: Zoo, tmp_path: Path
) -> None:
    model = load(zoo("llama_tied"))
    model.model.save_pretrained(tmp_path / "base")
    directory = _directory(tmp_path / "base", model)
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(directory.read(name), model.get_parameter(name).detach())


@pytest.fixture
def broken(zoo: Zoo, tmp_path: Path) -> Path:
    return Path(shutil.copytree(zoo("qwen3_moe"), tmp_path / "broken"))


def _refused(path: Path, model: PreTrainedModel, *words: str) -> None:
    with pytest.raises(fxq.SourceError) as caught:
        _directory(path, model)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_a_missing_tensor_is_named(broken: Path, zoo: Zoo) -> None:
    drop_tensors(broken, "model.layers.0.self_attn.q_norm.weight")
    _refused(broken, load(zoo("qwen3_moe")), "model.layers.0.self_attn.q_norm.weight")


@pytest.mark.parametrize("projections", [("up",), ("gate", "up"), ("down",), ("gate", "up", "down")])
@pytest.mark.parametrize("expert", [0, 4, EXPERTS - 1])
def test_a_missing_expert_is_never_filled_by_its_neighbour(
    projections: tuple[str, ...], expert: int, broken: Path, zoo: Zoo
) -> None:
    drop_tensors(broken, *(f"model.layers.1.mlp.experts.{expert}.{p}_proj.weight" for p in projections))
    _refused(broken, load(zoo("qwen3_moe")), "model.layers.1.mlp.experts")


def test_a_gap_in_expert_numbers_is_refused(broken: Path, zoo: Zoo) -> None:
    """Experts numbered 0 to 6 and 8: engines go by the number, stacking in order does not."""
    tensors = load_file(broken / "model.safetensors")
    moved = {k: t for k, t in tensors.items() if k.startswith("model.layers.1.mlp.experts.7.")}
    drop_tensors(broken, *moved)
    add_tensors(broken, {k.replace("experts.7.", "experts.8."): t.clone() for k, t in moved.items()})
    _refused(broken, load(zoo("qwen3_moe")), "model.layers.1.mlp.experts")


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.mlp.experts.4.up_proj.weight"])
def test_a_wrong_shape_is_named(name: str, broken: Path, zoo: Zoo) -> None:
    tensor = load_file(broken / "model.safetensors")[name]
    add_tensors(broken, {name: torch.zeros(tensor.shape[0] + 16, *tensor.shape[1:]).bfloat16()})
    _refused(broken, load(zoo("qwen3_moe")), name, str(tensor.shape[0] + 16))


def test_a_transposed_weight_is_a_wrong_shape(broken: Path, zoo: Zoo) -> None:
    name = "model.layers.1.self_attn.k_proj.weight"
    add_tensors(broken, {name: load_file(broken / "model.safetensors")[name].T.contiguous()})
    _refused(broken, load(zoo("qwen3_moe")), name, str(HIDDEN))


def _index(path: Path, change: dict[str, str]) -> None:
    names = load_file(path / "model.safetensors")
    weight_map = dict.fromkeys(names, "model.safetensors") | change
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_a_shard_that_is_not_there_is_named(broken: Path, zoo: Zoo) -> None:
    _index(broken, {"lm_head.weight": "model-00002.safetensors"})
    _refused(broken, load(zoo("qwen3_moe")), "model-00002.safetensors", "index")


@pytest.mark.parametrize(
    "place", ["../model.safetensors", "/etc/model.safetensors", "sub/model.safetensors", ".."]
)
def test_an_index_entry_that_leads_out_is_refused(place: str, broken: Path, zoo: Zoo) -> None:
    shutil.copy(broken / "model.safetensors", broken.parent)
    _index(broken, {"lm_head.weight": place})
    _refused(broken, load(zoo("qwen3_moe")), place)


def test_one_tensor_in_two_files_without_an_index_is_refused(broken: Path, zoo: Zoo) -> None:
    (broken / "model.safetensors").rename(broken / "part-1.safetensors")
    save_file({"lm_head.weight": torch.zeros(16, 16)}, broken / "part-2.safetensors")
    _refused(broken, load(zoo("qwen3_moe")), "lm_head.weight", "part-1.safetensors", "part-2.safetensors")


def test_other_files_beside_the_model_are_not_its_own(broken: Path, zoo: Zoo) -> None:
    """Such as an adapter's, or the same weights under another project's names."""
    save_file({"lm_head.weight": torch.zeros(16, 16)}, broken / "adapter_model.safetensors")
    assert set(_directory(broken, load(zoo("qwen3_moe"))).infos) == set(
        load_file(broken / "model.safetensors")
    )


def test_a_model_on_the_meta_device_is_refused_by_tensor(zoo: Zoo) -> None:
    with pytest.raises(fxq.SourceError, match=r"model\.embed_tokens\.weight.*meta"):
        Live(load(zoo("llama")).to("meta"))  # type: ignore[arg-type]


def test_a_parameter_nobody_has_is_an_error_of_ours(zoo: Zoo) -> None:
    with pytest.raises(fxq.SourceError, match="no_such"):
        Live(load(zoo("llama"))).read("no_such.weight")


def test_the_hugging_face_cache_is_a_directory_of_links_into_its_blobs(zoo: Zoo, tmp_path: Path) -> None:
    repository = tmp_path / "models--somebody--some-model"
    blobs, snapshot = repository / "blobs", repository / "snapshots" / "0123abcd"
    shutil.copytree(zoo("llama"), blobs)
    snapshot.mkdir(parents=True)
    for blob in blobs.iterdir():
        (snapshot / blob.name).symlink_to(Path("../../blobs") / blob.name)
    (tmp_path / "link").symlink_to(snapshot)
    for path in (snapshot, tmp_path / "link"):
        directory = Directory(path)
        for key, tensor in load_file(zoo("llama") / "model.safetensors").items():
            assert torch.equal(directory.read_hub(key), tensor)
    (snapshot / "more.json").symlink_to(zoo("llama") / "config.json")
    with pytest.raises(fxq.SourceError, match=r"more\.json: a link out"):
        Directory(snapshot)


def test_threads_read_what_one_thread_reads(zoo: Zoo) -> None:
    model = load(zoo("qwen3_moe"))
    directory = _directory(zoo("qwen3_moe"), model)
    asked = [(name, e) for name in _fused(model) for e in range(EXPERTS)] * 20
    with ThreadPoolExecutor(4) as threads:
        for (name, expert), found in zip(
            asked, threads.map(lambda a: directory.read_expert(*a), asked), strict=True
        ):
            assert torch.equal(found, model.get_parameter(name)[expert])


def test_a_file_cut_short_after_it_was_opened_is_named(broken: Path) -> None:
    directory = Directory(broken)
    file = broken / "model.safetensors"
    os.truncate(file, 5000)
    with pytest.raises(fxq.SourceError, match=r"safetensors: cannot read lm_head\.weight: the file ends"):
        directory.read_hub("lm_head.weight")


def test_a_directory_closes_its_files(broken: Path) -> None:
    before = set(os.listdir("/dev/fd"))
    directory = Directory(broken)
    assert len(os.listdir("/dev/fd")) == len(before) + 1
    del directory
    assert len(os.listdir("/dev/fd")) == len(before)


@pytest.mark.parametrize("family", ["llama", "gpt_oss"])
def test_a_part_of_a_tensor_is_read_alone(family: str, tmp_path: Path, reads: Reads) -> None:
    model = tiny.tiny_model(FORMS[family])
    model.save_pretrained(tmp_path / "model")
    directory = _directory(tmp_path / "model", model)
    live = Live(model)
    for key, tensor in load_file(tmp_path / "model/model.safetensors").items():
        for part in (range(1, 3), range(2, len(tensor)), range(0)):
            reads.clear()
            wanted = tensor[part.start : part.stop]
            assert torch.equal(directory.read_hub(key, part), wanted), key
            assert sum(size for _, size in reads) == wanted.nbytes
            assert torch.equal(live.read_hub(key, part), wanted), key
