"""Where SGLang is installed: a Python other than ours, because SGLang and modelopt pin different transformers."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

from pdtrim_deploy.errors import UserError

REPO = Path(__file__).resolve().parents[2]  # in a clone; in an installed wheel, a folder without .venv


@dataclass(frozen=True)
class ServeEnvironment:
    """The Python that can import sglang and sglang_router."""

    python: Path

    @classmethod
    def find(cls, python: Path | None = None) -> ServeEnvironment:
        """The given Python, else `.venv/serve` of the working directory or the clone, else our own.

        Raises:
            UserError: `python` is no program, or no place has SGLang.

        """
        if python is not None:
            path = shutil.which(python)
            if path is None:
                raise UserError(f"--serve-python {python}: no such program; give the Python that has sglang installed")
            return cls(Path(path).absolute())  # absolute, never resolved: a venv's python is a symlink
        for folder in (Path.cwd(), REPO):
            candidate = folder / ".venv" / "serve" / "bin" / "python"
            if candidate.exists():
                return cls(candidate)
        if importlib.util.find_spec("sglang") and importlib.util.find_spec("sglang_router"):
            return cls(Path(sys.executable))
        raise UserError(
            "no SGLang was found in .venv/serve; make it with: make setup, or name a Python that has it: --serve-python"
        )


def gpu_count() -> int:
    """GPUs that nvidia-smi lists, as far as CUDA_VISIBLE_DEVICES leaves them to us and our workers; 0 without it."""
    smi = shutil.which("nvidia-smi")
    if smi is None:
        return 0
    listed = subprocess.run([smi, "-L"], check=False, capture_output=True, text=True).stdout
    count, ids = len(re.findall("^GPU ", listed, re.MULTILINE)), re.findall(r"UUID: ([^\s)]+)", listed)
    left = os.environ.get("CUDA_VISIBLE_DEVICES")
    if left is None:
        return count

    def there(device: str) -> bool:
        named = device.startswith(("GPU-", "MIG-")) and any(gpu.startswith(device) for gpu in ids)
        return int(device) < count if re.fullmatch(r"\d+", device) else named

    return len(list(takewhile(there, map(str.strip, left.split(",")))))  # CUDA stops at the first that is not there
