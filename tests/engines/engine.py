"""vLLM in a process and an environment of its own, asked over a pipe; tests/engines/driver.py answers."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from types import TracebackType
from typing import Any, Self

DRIVER = Path(__file__).with_name("driver.py")


class EngineError(Exception):
    """vLLM raised; the message is its own."""


class Vllm:
    """One vLLM process, which loads one checkpoint after another."""

    def __init__(self, environment: Path, log: Path) -> None:
        """environment: a directory made by environment.py. log: where vLLM's own output goes."""
        self.python, self.log = environment / "bin" / "python", log
        self.process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process is not None and self.process.stdin is not None:
            self.process.stdin.close()
            self.process.wait(timeout=60)

    def load(self, checkpoint: Path, out: Path) -> Path:
        """Write everything that vLLM holds of a checkpoint into the safetensors file `out`."""
        self._ask({"checkpoint": str(checkpoint), "out": str(out)})
        return out

    def generate(self, checkpoint: Path, prompt: list[int], tokens: int) -> list[int]:
        """The ids of `tokens` greedy tokens after `prompt`."""
        generated = self._ask({"checkpoint": str(checkpoint), "prompt": prompt, "tokens": tokens})
        return list(generated["tokens"])

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        process = self.process = self._running()
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps(request) + "\n")
        process.stdin.flush()
        line = process.stdout.readline()
        if not line:
            raise EngineError(f"vLLM ended with {process.wait()}; see {self.log}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise EngineError(answer["error"])
        return answer

    def _running(self) -> subprocess.Popen[str]:
        if self.process is not None and self.process.poll() is None:
            return self.process
        own = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        with self.log.open("a") as log:
            return subprocess.Popen(
                [self.python, DRIVER],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=own,
            )
