"""Write docs/engines.md: what vLLM holds of every case, as `python -m tests.engines.matrix DIR` finds it."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from tests.engines.cases import CASES, Case, loaded
from tests.engines.engine import EngineError, Vllm
from tests.engines.environment import VLLM

PAGE = Path(__file__).parents[2] / "docs" / "engines.md"
HEAD = f"""# What engines make of the output

Tiny random models of each architecture, compiled by fxq and loaded into real vLLM ({VLLM}) on a CPU:
its config, name mapping, weight loader and post-processing; only the arithmetic kernels are stand-ins. A
tensor counts as exact if what vLLM holds after loading, dequantized by vLLM's own code, is bit for bit what
the files mean by `tests/reader.py`, which shares no code with the writer. A quantized weight with its scales
counts once; input scales, KV scales and unquantized tensors count each. `python -m tests.engines.matrix DIR`
makes this page; `tests/engines/README.md` says how to make DIR.

| model | format | spec | exact |
|---|---|---|---|
"""
NOTES = """
Weight-only (W4A16): vLLM picks Marlin, which needs a GPU, and refuses to start on a CPU; with the kernel
stood in for, all that comes before it runs and is compared.

A calibrated KV scale in ModelOpt's format goes through a parameter of the model's dtype in vLLM, so the scale
it uses is the stored one rounded to bfloat16; that is what is compared (in compressed-tensors it stays as it
is). compressed-tensors stores divisors: what is compared is 1 / divisor, as vLLM takes it. The expansion of a
latent (`kv_b_proj` of MLA) is compared as the two matrices that vLLM makes of it and uses.
Multi-token-prediction layers are not compared: vLLM loads them with another class. Experts are loaded, not
run; dense W4A4 models also generate.
"""


def rows(cases: Iterable[Case], environment: Path) -> Iterator[str]:
    """A line of the table a case."""
    with tempfile.TemporaryDirectory() as work, Vllm(environment, Path(work) / "vllm.log") as engine:
        for case in cases:
            try:
                found = loaded(case, Path(work), engine)
                result = f"{found.exact}/{found.compared}"
                result += "".join(f"; {d.name}: {d.reason}" for d in found.differences[:1])
            except EngineError as error:
                result = f"refused: {error}"
            yield f"| {case.model} | {case.format} | {case.spec} | {result} |"


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("usage: python -m tests.engines.matrix DIR")
    table = "".join(f"{line}\n" for line in rows(CASES, Path(sys.argv[1])))
    PAGE.write_text(HEAD + table + NOTES, encoding="utf-8")
