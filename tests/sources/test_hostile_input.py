"""Whatever a header, an index, a config, a spec or a calibration line holds, only an FxqError comes of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save

import fxq
from fxq.errors import SourceError
from fxq.graph.hub import TensorInfo
from fxq.model import open_model
from fxq.passes import PASSES
from fxq.pipeline import spec
from fxq.sources.encodings import encoding_of
from fxq.sources.files import INDEX, check_depth, read_config, shards
from fxq.sources.safetensors_file import DTYPES, SafetensorsFile
from fxq.sources.samples import load_samples
from tests.families import VOCABULARY, Zoo, zoo

__all__ = ["zoo"]

NO_CHECKS = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]


def bounded(examples: int) -> Callable[..., Any]:
    """Settings of a fuzz test: always the same inputs, and no clock."""
    return settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=NO_CHECKS,
    )


TENSORS = {
    "a": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "model.b": torch.arange(5, dtype=torch.int64),
    "c": torch.zeros(0, 4, dtype=torch.bfloat16),
    "d": torch.tensor(1.5),
}
FILE = save(TENSORS, {"format": "pt"})
HEADER = json.loads(FILE[8 : 8 + int.from_bytes(FILE[:8], "little")])
DATA = FILE[8 + int.from_bytes(FILE[:8], "little") :]

numbers = st.one_of(
    st.integers(-2, 80),
    st.sampled_from([2**31, 2**53, 2**62, 2**63, 2**64, 10**30, -(2**63)]),
    st.floats(),
)
leaves = st.one_of(
    st.none(), st.booleans(), numbers, st.text(max_size=8), st.sampled_from([*DTYPES, "F4", "U16"])
)
values = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=8,
)


@st.composite
def mutated(draw: st.DrawFn, original: bytes) -> bytes:
    """A few bytes of a real file changed, cut out, repeated or put in."""
    data = bytearray(original)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(len(data) - 1, 0)))
        match draw(st.sampled_from(["set", "cut", "insert", "truncate", "repeat"])):
            case "set":
                data[at : at + 1] = bytes([draw(st.integers(0, 255))])
            case "cut":
                del data[at : at + draw(st.integers(1, 16))]
            case "insert":
                data[at:at] = draw(st.binary(max_size=8))
            case "truncate":
                del data[at:]
            case _:
                data[at:at] = data[at : at + draw(st.integers(1, 64))]
    return bytes(data)


@st.composite
def lying(draw: st.DrawFn) -> bytes:
    """A well-formed file whose header says something else about its tensors."""
    header = json.loads(json.dumps(HEADER))
    for _ in range(draw(st.integers(1, 3))):
        key = draw(st.sampled_from([*TENSORS, "more", "__metadata__"]))
        entry = header.setdefault(key, {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]})
        field = draw(st.sampled_from(["dtype", "shape", "data_offsets", "more", ""]))
        if field in ("shape", "data_offsets") and draw(st.booleans()):
            entry[field] = draw(st.lists(numbers, min_size=1, max_size=3))
        elif field:
            entry[field] = draw(values)
        else:
            header[key] = draw(values)
            break
    text = json.dumps(header).encode()
    length = draw(st.sampled_from([len(text), len(text), len(text), len(text) - 1, 0, 2**40, 2**64 - 1]))
    return length.to_bytes(8, "little") + text + DATA + draw(st.binary(max_size=2))


def _check_message(error: fxq.FxqError, where: str) -> None:
    message = str(error)
    assert where in message
    assert 1 <= len(message.splitlines()) <= 3, message
    assert message.replace("\n", "").isprintable(), message
    assert len(message) < 1000, message


def _read_or_refuse(file: Path) -> None:
    """An accepted file is one that safetensors accepts, and is read like it."""
    try:
        opened = SafetensorsFile(file)
    except fxq.SourceError as error:
        _check_message(error, str(file))
        return
    with safe_open(file, framework="pt") as theirs:
        assert set(opened.entries) == set(theirs.keys())
        for key, entry in opened.entries.items():
            out = torch.empty(entry.info.shape, dtype=entry.info.dtype)
            opened.read(key, out)
            wanted = theirs.get_tensor(key)
            assert (wanted.shape, wanted.dtype) == (out.shape, out.dtype)
            assert torch.equal(out.reshape(-1).view(torch.uint8), wanted.reshape(-1).view(torch.uint8))


@bounded(300)
@given(data=st.one_of(mutated(FILE), lying()))
def test_a_header_is_believed_only_when_it_is_true(data: bytes, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(data)
    _read_or_refuse(file)


names = st.one_of(
    st.sampled_from(["model.safetensors", "..", "../x", "/etc/passwd", "", ".", "sub/x", "a\0b", "x" * 300]),
    st.text(max_size=10),
    values,
)


@bounded(200)
@given(
    index=st.one_of(
        st.dictionaries(st.sampled_from(["weight_map", "metadata"]), values, max_size=2),
        st.fixed_dictionaries({"weight_map": st.dictionaries(st.text(max_size=8), names, max_size=4)}),
        values,
    ).map(lambda v: json.dumps(v).encode())
    | mutated(json.dumps({"weight_map": dict.fromkeys(TENSORS, "model.safetensors")}).encode())
)
def test_an_index_names_files_of_its_directory_or_nothing(index: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(FILE)
    (tmp_path / INDEX).write_bytes(index)
    try:
        found, _ = shards(tmp_path)
    except fxq.SourceError as error:
        _check_message(error, str(tmp_path))
        return
    assert found == ("model.safetensors",)


NAMES = [
    ["m.weight", "m.weight_scale_inv", "n.scale"],
    ["m.weight", "m.weight_scale", "m.weight_scale_2"],
    ["m.weight_packed", "m.weight_scale", "m.weight_global_scale"],
    ["m_blocks", "m_scales", "m_weight_scale"],
]


@bounded(200)
@given(
    quantization=values
    | st.fixed_dictionaries(
        {"quant_method": st.sampled_from(["fp8", "gptq", "mxfp4", "compressed-tensors", "modelopt", 3])},
        optional={
            "weight_block_size": values,
            "fmt": values,
            "format": st.just("pack-quantized") | values,
            "config_groups": values,
            "quant_algo": st.just("MXFP8") | values,
            "quantized_layers": values,
        },
    ),
    shapes=st.lists(st.lists(st.integers(0, 300), max_size=3), min_size=3, max_size=3),
    dtypes=st.lists(st.sampled_from(list(DTYPES.values())), min_size=3, max_size=3),
    data=st.data(),
)
def test_stored_formats_are_understood_or_refused(
    quantization: Any, shapes: list[list[int]], dtypes: list[torch.dtype], data: Any, tmp_path: Path
) -> None:
    keys = data.draw(st.sampled_from(NAMES))
    raw = {
        key: TensorInfo(tuple(shape), dtype) for key, shape, dtype in zip(keys, shapes, dtypes, strict=True)
    }
    try:
        encoding = encoding_of({"quantization_config": quantization}, raw, tmp_path)
    except fxq.SourceError as error:
        _check_message(error, str(tmp_path))
        return
    assert not any("float8" in str(info.dtype) for info in encoding.infos.values())


SHIPPED = [path.read_bytes() for path in spec.shipped().values()]
FRAGMENTS = """passes: ! - ! !lower!: !{!}![!]!&a !*a!quantize-linears!only!weights!nvfp4!'!"!|!? !<<: !1e999
0x1f!2001-01-01!.nan!~!%YAML 1.1!---!...!description!skip!true!é"""
ODD = ["\n", "\t", "\0", "\ud800", "!!python/name:os.system ", "!!int "]
fragments = st.sampled_from([*FRAGMENTS.replace("\n", "!").split("!"), *ODD])
texts = st.one_of(
    st.lists(fragments, max_size=30).map("".join),
    st.sampled_from(SHIPPED).flatmap(lambda t: mutated(t)).map(lambda b: b.decode("utf-8", "replace")),
    values.map(lambda v: yaml.safe_dump({"passes": [{"quantize-linears": v}]})),
    values.map(lambda v: yaml.safe_dump({"passes": v})),
)


@bounded(300)
@given(text=texts)
def test_a_spec_is_a_spec_or_an_error(text: str) -> None:
    try:
        spec.parse(text, PASSES, "mine.yaml")
    except fxq.SpecError as error:
        _check_message(error, "mine.yaml")


@pytest.mark.parametrize(
    "text", ["[" * 100_000, "{a: " * 50_000, "- " * 50_000, "a: &x [*x]", "passes: &p [*p]"]
)
def test_a_spec_cannot_nest_or_repeat_without_end(text: str) -> None:
    with pytest.raises(fxq.SpecError):
        spec.parse(text, PASSES, "mine.yaml")


def test_a_billion_laughs_are_refused_at_the_first(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x]"] + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
    with pytest.raises(fxq.SpecError, match=r"mine\.yaml:2: .*aliases"):
        spec.parse("\n".join([*lines, "passes: *a11"]), PASSES, "mine.yaml")


def test_a_spec_file_of_any_size_is_not_read_beyond_what_a_spec_needs(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    with path.open("wb") as file:
        file.truncate(1 << 34)
    with pytest.raises(fxq.SpecError, match="1,048,576"):
        spec.load(path, PASSES)


def _encode(text: str) -> list[int]:
    if "!" in text:
        raise TypeError("TextInputSequence must be str")
    return [min(ord(letter), VOCABULARY) for letter in text]


lines = st.one_of(
    st.binary(max_size=40),
    values.map(lambda v: json.dumps(v).encode()),
    st.fixed_dictionaries({}, optional={"text": values, "input_ids": values, "attention_mask": values}).map(
        lambda v: json.dumps(v).encode()
    ),
    st.lists(st.integers(0, 3), max_size=4).map(lambda v: json.dumps({"input_ids": v}).encode()),
    st.sampled_from(
        [b"[" * 100_000, b'{"input_ids": [' + b"9" * 5000 + b"]}", b"\xff\xfe", b"\0" * 9, b"NaN"]
    ),
)


@bounded(300)
@given(content=st.lists(lines, max_size=5))
def test_a_calibration_file_gives_samples_or_an_error(content: list[bytes], tmp_path: Path) -> None:
    file = tmp_path / "calib.jsonl"
    file.write_bytes(b"\n".join(content))
    try:
        found = load_samples(file, _encode, vocabulary=VOCABULARY, samples=9, length=4)
    except fxq.SourceError as error:
        _check_message(error, str(file))
        return
    assert found
    assert all(0 <= token < VOCABULARY for ids in found for token in ids)


@bounded(300)
@given(items=st.lists(values | st.binary(max_size=3), max_size=3))
def test_python_samples_give_samples_or_an_error(items: list[Any]) -> None:
    try:
        load_samples(items, _encode, vocabulary=VOCABULARY, samples=9, length=4)
    except fxq.SourceError as error:
        _check_message(error, "calib")


def test_a_line_without_end_is_not_read_to_its_end(tmp_path: Path) -> None:
    file = tmp_path / "calib.jsonl"
    with file.open("wb") as out:
        out.truncate(1 << 34)
    with pytest.raises(fxq.SourceError, match=r"calib\.jsonl:1: .*67,108,864 bytes"):
        load_samples(file, _encode, vocabulary=VOCABULARY, samples=9, length=4)


@pytest.fixture(scope="module")
def dense(zoo: Zoo, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose config.json may be changed."""
    return Path(shutil.copytree(zoo("llama"), tmp_path_factory.mktemp("hostile") / "model"))


KEYS = ["num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "vocab_size"]
KEYS += ["head_dim", "model_type", "architectures", "dtype", "rope_parameters", "hidden_act", "layer_types"]
KEYS += ["max_position_embeddings", "auto_map", "quantization_config", "text_config", "rms_norm_eps"]
wrong = st.one_of(values, st.sampled_from([0, -1, 10**9, 2**40, 10**30, "4", "", [], {}, 1.5, True]))


@bounded(40)
@given(changes=st.dictionaries(st.sampled_from(KEYS), wrong, min_size=1, max_size=2))
def test_a_config_makes_a_model_or_an_error(changes: dict[str, Any], dense: Path, zoo: Zoo) -> None:
    config = json.loads((zoo("llama") / "config.json").read_text())
    (dense / "config.json").write_text(json.dumps(config | changes))
    try:
        open_model(dense)
    except fxq.FxqError as error:
        _check_message(error, "")


@bounded(150)
@given(
    data=mutated(b'{"model_type": "llama", "hidden_size": 64, "rope_parameters": {"rope_theta": 1e4}}')
    | st.binary()
)
def test_a_config_file_is_an_object_or_an_error(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(data)
    try:
        assert isinstance(read_config(tmp_path), dict)
    except fxq.SourceError as error:
        _check_message(error, str(tmp_path))


def test_a_layer_that_is_counted_from_the_end_is_no_count_of_layers(tmp_path: Path) -> None:
    config = {
        "vision_feature_layer": -2,
        "feature_layer": -1,
        "max_window_layers": -1,
        "num_hidden_layers": 2,
    }
    check_depth(tmp_path, {**config, "vision_config": config}, 10)
    with pytest.raises(SourceError, match="num_hidden_layers is -1"):
        check_depth(tmp_path, {"text_config": {"num_hidden_layers": -1}}, 10)
