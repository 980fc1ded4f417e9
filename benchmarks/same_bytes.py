"""SHA-256 of every file that a commit writes, for every shipped spec, and what differs from another commit's.

    python benchmarks/same_bytes.py OUT.json [--model DIR CALIB] ... [--spec NAME ...] [--family NAME ...]
    python benchmarks/same_bytes.py --compare before.json after.json

Models: the demo, tiny random ones of a dozen families of all forms that experts, attentions and linears have,
and those given. Of report.json what was measured (times, memory) is left out, and the page made from it. A
spec that a model refuses counts with its error. To hash another commit, check it out elsewhere and run this
file there, or with that directory first in PYTHONPATH.
"""

import argparse
import hashlib
import json
import sys
import tempfile
from pathlib import Path

import fxq
from tests.tiny import families, text_ids, tiny_model

ROOT = Path(__file__).parents[1]
FAMILIES = (
    "llama", "gpt2", "phi3", "gemma3_text", "mixtral", "qwen3_moe", "qwen3_next", "deepseek_v3", "gpt_oss",
    "llama4_text", "granitemoe", "jamba", "ernie4_5_moe", "olmoe", "llava/LlavaForConditionalGeneration",
)  # fmt: skip


def hashes(out: Path) -> dict[str, str]:
    """File -> its SHA-256."""
    found = {}
    for file in sorted(path for path in out.rglob("*") if path.is_file()):
        name, content = str(file.relative_to(out)), file.read_bytes()
        if name == "fxq-report/report.html":
            continue
        if name == "fxq-report/report.json":
            report = json.loads(content)
            del report["measured"]
            content = json.dumps(report, sort_keys=True).encode()
        found[name] = hashlib.sha256(content).hexdigest()
    return found


def compiled(model: Path, spec: str, calib: object, options: argparse.Namespace) -> dict[str, str]:
    """What one spec writes of a model, or why not."""
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch, "out")
        try:
            fxq.compile(
                model,
                spec,
                calib=calib,
                out=out,
                samples=options.samples,
                seq_len=options.seq_len,
                device=options.device,
                allow_partial=True,
            )
        except fxq.FxqError as error:
            return {"error": f"{type(error).__name__}: {error}".replace(str(model), "MODEL")}
        return hashes(out)


def compare(before: Path, after: Path) -> int:
    """Print what differs; 1 if anything does."""
    old, new = (json.loads(path.read_text()) for path in (before, after))
    differing = 0
    for run in sorted({*old, *new}):
        ours, theirs = new.get(run, {}), old.get(run, {})
        names = [name for name in sorted({*ours, *theirs}) if ours.get(name) != theirs.get(name)]
        differing += len(names)
        for name in names:
            print(f"{run}: {name}: {theirs.get(name, 'absent')} before, {ours.get(name, 'absent')} after")
    files = sum(map(len, new.values()))
    print(f"{len(new)} runs, {files} files, {differing} differ")
    return int(differing > 0)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--compare", action="store_true")
    parser.add_argument("--model", nargs=2, action="append", default=[], metavar=("DIR", "CALIB"))
    parser.add_argument("--spec", nargs="+", default=sorted(path.stem for path in ROOT.glob("specs/*.yaml")))
    parser.add_argument("--family", nargs="*", default=FAMILIES, metavar="NAME")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=64)
    options = parser.parse_args()
    if options.compare:
        return compare(*options.files)
    found: dict[str, dict[str, str]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        models = [("demo", ROOT / "demo/model", ROOT / "demo/calib.jsonl")]
        models += [(Path(directory).name, Path(directory), calib) for directory, calib in options.model]
        for family in families():
            if family.name in options.family:
                place = Path(scratch, family.model_type)
                tiny_model(family).save_pretrained(place)
                models.append((family.name, place, text_ids(4, 24).tolist()))
        for name, model, calib in models:
            for spec in options.spec:
                found[f"{name} {spec}"] = compiled(model, spec, calib, options)
                print(f"{name} {spec}: {len(found[f'{name} {spec}'])} files", file=sys.stderr)
                options.files[0].write_text(json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
