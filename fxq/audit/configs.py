"""The quantization configs: complete, of NVFP4 in blocks of 16, and both files saying the same."""

from collections.abc import Iterator, Mapping
from typing import Any

from fxq.audit.checkpoint import ALGORITHMS, COMPRESSED, CONFIG, NESTED, Checkpoint, Kind, names
from fxq.audit.findings import Finding
from fxq.audit.store import Json

KNOWN = (*(name for algorithms in ALGORITHMS.values() for name in algorithms), "MIXED_PRECISION")
# Keys that sources' own quantization configs have and NVFP4's never.
_OTHERS = ("weight_block_size", "activation_scheme", "modules_to_not_convert", "bits", "load_in_4bit", "fmt")


def check(checkpoint: Checkpoint) -> Iterator[Finding]:
    """config.json, and for ModelOpt hf_quant_config.json too."""
    yield from _stray(checkpoint)
    if checkpoint.declared.format == COMPRESSED:
        yield from _compressed(checkpoint.quantization)
        if checkpoint.nested is not None:
            yield Finding("config-disagree", NESTED, "expected none beside a compressed-tensors config")
        return
    flat, inner = checkpoint.quantization, (checkpoint.nested or {}).get("quantization")
    inner = inner if isinstance(inner, dict) else {}
    if not flat and not inner:
        yield Finding("config-key", CONFIG, "packed tensors, but no file declares a quantization")
        return
    for missing, name in ((not flat, f"{CONFIG}: quantization_config"), (not inner, NESTED)):
        if missing:
            yield Finding("config-one-file", name, "expected, found only the other file's")
    if flat:
        yield from _flat(flat)
    if inner:
        yield from _nested(inner)
    if flat and inner:
        yield from _disagreements(flat, inner)
    yield from _layers(checkpoint, flat or inner)


def _stray(checkpoint: Checkpoint) -> Iterator[Finding]:
    """What a quantized source leaves behind."""
    for key, value in checkpoint.config.items():
        if isinstance(value, dict) and isinstance(value.get("quantization_config"), dict):
            yield Finding(
                "config-stray", f"{CONFIG}: {key}.quantization_config", "expected at the top level only"
            )
    for key in _OTHERS:
        if key in checkpoint.quantization:
            yield Finding(
                "config-stray",
                f"{CONFIG}: quantization_config.{key}",
                "no key of an NVFP4 config; of the source?",
            )


def _flat(flat: Json) -> Iterator[Finding]:
    where = f"{CONFIG}: quantization_config"
    if not str(flat.get("quant_method")).startswith("modelopt"):
        yield Finding(
            "config-key", f"{where}.quant_method", f"expected modelopt, found {flat.get('quant_method')!r}"
        )
    if "ignore" not in flat and flat.get("quant_algo") != "MIXED_PRECISION":
        yield Finding("config-key", f"{where}.ignore", "expected the exclude list, found none")
    yield from _algorithm(where, flat)
    scheme = flat.get("kv_cache_scheme")
    if isinstance(scheme, dict):
        if scheme.get("type") == "float" and scheme.get("num_bits") == 4:
            yield Finding(
                "kv-scheme",
                f"{where}.kv_cache_scheme",
                "NVFP4: vLLM takes it with --kv-cache-dtype nvfp4 alone",
            )
        elif scheme.get("num_bits") != 8 or scheme.get("type") != "float":
            yield Finding("kv-scheme", f"{where}.kv_cache_scheme", f"expected 8-bit floats, found {scheme}")
    elif scheme is not None:
        yield Finding(
            "kv-scheme", f"{where}.kv_cache_scheme", f"only an object is portable, found {scheme!r}"
        )
    if flat.get("quant_algo") in (None, *ALGORITHMS[Kind.NVFP4]):
        yield from _groups(where, flat)


def _groups(where: str, flat: Json) -> Iterator[Finding]:
    groups = flat.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        yield Finding("config-groups", where, f"expected a group in config_groups, found {groups!r}")
        return
    for name, group in groups.items():
        group = group if isinstance(group, dict) else {}
        weights, inputs = group.get("weights"), group.get("input_activations")
        if not _is_nvfp4(weights):
            yield Finding("config-groups", f"{where}.{name}.weights", f"expected NVFP4, found {weights!r}")
        if flat.get("quant_algo") == "W4A16_NVFP4" and inputs is not None:
            yield Finding(
                "config-groups",
                f"{where}.{name}.input_activations",
                f"expected null with W4A16, found {inputs!r}",
            )
        elif inputs is not None and not _is_nvfp4(inputs):
            yield Finding(
                "config-groups", f"{where}.{name}.input_activations", f"expected NVFP4, found {inputs!r}"
            )


def _is_nvfp4(value: Any) -> bool:
    """4-bit floats in blocks of 16."""
    fits = isinstance(value, dict) and value.get("num_bits") == 4 and value.get("type") == "float"
    return fits and value.get("group_size", 16) == 16


def _nested(inner: Json) -> Iterator[Finding]:
    where = f"{NESTED}: quantization"
    for key in ("quant_algo", "kv_cache_quant_algo", "group_size", "exclude_modules"):
        mixed = inner.get("quant_algo") == "MIXED_PRECISION" and key == "group_size"
        if key not in inner and not mixed:
            yield Finding("config-key", f"{where}.{key}", "vLLM requires it, null or not; found none")
    if "quant_algo" in inner:
        yield from _algorithm(where, inner)
    is_nvfp4 = inner.get("quant_algo") in (*ALGORITHMS[Kind.NVFP4], "MIXED_PRECISION")
    if is_nvfp4 and inner.get("group_size", 16) != 16:
        yield Finding("config-key", f"{where}.group_size", f"expected 16, found {inner['group_size']!r}")
    if inner.get("kv_cache_quant_algo") not in (None, "FP8", "NVFP4"):
        found = inner["kv_cache_quant_algo"]
        expected = "expected FP8, NVFP4 or null"
        yield Finding("kv-scheme", f"{where}.kv_cache_quant_algo", f"{expected}, found {found!r}")


def _algorithm(where: str, config: Json) -> Iterator[Finding]:
    found = config.get("quant_algo")
    if found not in KNOWN:
        known = ", ".join(KNOWN)
        yield Finding("config-key", f"{where}.quant_algo", f"expected one of {known}; found {found!r}")


def _disagreements(flat: Json, inner: Json) -> Iterator[Finding]:
    if flat.get("quant_algo") != inner.get("quant_algo"):
        yield _differ("quant_algo", flat.get("quant_algo"), inner.get("quant_algo"))
    kv = flat.get("kv_cache_scheme", flat.get("kv_cache_quant_algo"))
    if bool(kv) != bool(inner.get("kv_cache_quant_algo")):
        yield _differ("the KV cache", kv, inner.get("kv_cache_quant_algo"))
    ours, theirs = names(flat.get("ignore", flat.get("exclude_modules"))), names(inner.get("exclude_modules"))
    for entry in sorted(set(ours) ^ set(theirs)):
        here, there = (CONFIG, NESTED) if entry in ours else (NESTED, CONFIG)
        yield Finding("config-disagree", f"exclude list: {entry}", f"listed in {here}, not in {there}")
    if flat.get("quantized_layers") != inner.get("quantized_layers"):
        yield Finding("config-disagree", "quantized_layers", "expected the same in both files")


def _differ(what: str, ours: object, theirs: object) -> Finding:
    return Finding("config-disagree", what, f"{ours!r} in {CONFIG}, {theirs!r} in {NESTED}")


def _layers(checkpoint: Checkpoint, chosen: Json) -> Iterator[Finding]:
    """MIXED_PRECISION: the listed layers are the quantized ones, each of the algorithm listed."""
    layers = chosen.get("quantized_layers")
    if checkpoint.declared.algorithm != "MIXED_PRECISION":
        if layers:
            yield Finding("config-layers", "quantized_layers", "engines read it only with MIXED_PRECISION")
        return
    if not isinstance(layers, dict) or not layers:
        yield Finding("config-layers", "quantized_layers", f"expected an object, found {layers!r}")
        return
    for name, linear in checkpoint.linears.items():
        algorithm = checkpoint.declared.algorithm_of(linear)
        if algorithm is None:
            yield Finding(
                "config-layers", name, f"expected in quantized_layers as it is {linear.kind}; found it is not"
            )
        elif algorithm not in ALGORITHMS[linear.kind]:
            yield Finding(
                "config-layers", name, f"quantized_layers say {algorithm}, its tensors {linear.kind}"
            )
    owners = _owners(checkpoint)
    for name in layers:
        if name not in owners:
            yield Finding("config-layers", name, "listed in quantized_layers, but nothing of it is quantized")
    sizes = {
        layer.get("group_size", 16) for layer in layers.values() if "NVFP4" in str(_of(layer, "quant_algo"))
    }
    if sizes - {16}:
        yield Finding("config-layers", "quantized_layers", f"expected group_size 16, found {sorted(sizes)}")
    blocks = {
        layer.get("group_size", 128)
        for layer in layers.values()
        if _of(layer, "quant_algo") in ALGORITHMS[Kind.FP8_BLOCKS]
    }
    if blocks - {128}:
        found = sorted(map(str, blocks))
        yield Finding("config-layers", "quantized_layers", f"expected FP8 blocks of 128, found {found}")


def _of(layer: object, key: str) -> object:
    return layer.get(key) if isinstance(layer, Mapping) else None


def _owners(checkpoint: Checkpoint) -> set[str]:
    """Every quantized linear and every module around one."""
    owners: set[str] = set()
    for name in checkpoint.linears:
        while name and name not in owners:
            owners.add(name)
            name = name.rpartition(".")[0]
    return owners


def _compressed(flat: Json) -> Iterator[Finding]:
    where = f"{CONFIG}: quantization_config"
    status = flat.get("quantization_status")
    if status != "compressed":
        yield Finding("config-key", f"{where}.quantization_status", f"expected compressed, found {status!r}")
    if not isinstance(flat.get("ignore"), list):
        yield Finding("config-key", f"{where}.ignore", f"expected a list, found {flat.get('ignore')!r}")
    groups = flat.get("config_groups")
    for name, group in groups.items() if isinstance(groups, dict) else ():
        weights, inputs = group.get("weights") or {}, group.get("input_activations")
        if weights.get("num_bits") != 4:
            continue
        expected = {"type": "float", "group_size": 16, "strategy": "tensor_group"}
        for key, value in expected.items():
            for side, found in (("weights", weights), ("input_activations", inputs)):
                if found is not None and found.get(key) != value:
                    yield Finding(
                        "config-groups",
                        f"{where}.{name}.{side}.{key}",
                        f"expected {value!r}, found {found.get(key)!r}",
                    )
        if inputs is not None and inputs.get("dynamic") != "local":
            yield Finding(
                "config-groups",
                f"{where}.{name}.input_activations.dynamic",
                f"expected 'local', found {inputs.get('dynamic')!r}",
            )
        if not names(group.get("targets")):
            yield Finding(
                "config-groups", f"{where}.{name}.targets", "expected names of modules or classes, found none"
            )
