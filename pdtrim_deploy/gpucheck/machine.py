"""What the machine and its Pythons have: asked in processes of their own, since an import may take long or crash."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pdtrim_deploy.gpucheck.base import Part

PACKAGES = ("torch", "triton", "sglang", "transformers", "pydantic", "yaml", "nixl", "mooncake", "tensorrt", "onnx")
_PROJECTS = {"yaml": "pyyaml", "mooncake": "mooncake-transfer-engine"}  # where a package is named unlike its module
IMPORT_S = 90.0
_SCRIPT = """
import importlib.metadata, importlib.util, json, platform, sys
has = [name for name in sys.argv[1:] if importlib.util.find_spec(name)]
versions = {"python": platform.python_version()}
for name in has:
    try: versions[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError: pass
device = {}
if "torch" in has:
    import torch
    versions["cuda"] = torch.version.cuda or ""
    if torch.cuda.is_available():
        shown = torch.cuda.get_device_properties(0)
        device = {"name": shown.name, "count": torch.cuda.device_count(), "memory": shown.total_memory,
                  "capability": f"{shown.major}.{shown.minor}"}
print(json.dumps({"modules": has, "versions": versions, "device": device}))
"""


@dataclass(frozen=True)
class Environment:
    """A Python: what it can import, in which versions, and the CUDA device that its torch sees (empty: none).

    `problem` says why it did not answer; empty when it did.
    """

    python: Path
    modules: Sequence[str] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    device: Mapping[str, str | int] = field(default_factory=dict)
    problem: str = ""

    @classmethod
    def of(cls, python: Path, timeout_s: float = IMPORT_S) -> Environment:
        """What that Python says; one that crashes or says nothing in time has nothing."""
        try:
            done = subprocess.run(
                [python, "-c", _SCRIPT, *PACKAGES], capture_output=True, text=True, check=True, timeout=timeout_s
            )
            facts = json.loads(done.stdout.splitlines()[-1])
            return cls(python, facts["modules"], facts["versions"], facts["device"])
        except subprocess.TimeoutExpired:
            return cls(python, problem=f"{python} did not say within {timeout_s:.0f} s what it has")
        except subprocess.CalledProcessError as error:
            last = (error.stderr.strip().splitlines() or [f"exit code {error.returncode}"])[-1][:200]
            return cls(python, problem=f"{python} cannot say what it has: {last}")
        except (OSError, ValueError, IndexError, KeyError) as error:
            return cls(python, problem=f"{python} cannot say what it has: {type(error).__name__}")

    def lacks(self, modules: Sequence[str], device: bool) -> str:
        """Why it cannot do, in one sentence; empty when it can."""
        if self.problem:
            return self.problem
        if "torch" not in self.modules:
            return f"{self.python} has no torch"
        if device and not self.device:
            return f"the torch of {self.python} ({self.versions.get('torch')}) sees no CUDA device"
        missing = [name for name in modules if name not in self.modules]
        if not missing:
            return ""
        install = f"{self.python} -m pip install {' '.join(_PROJECTS.get(name, name) for name in missing)}"
        return f"{self.python} has no {', '.join(missing)}; {install}"


def choose(part: Part, here: Environment, serve: Environment | None) -> tuple[Environment | None, str]:
    """The Python that runs a part, or None and why there is none."""
    if part.serves:
        if serve is None:
            return None, "no Python with SGLang was found; make it with: make setup, or name it: --serve-python"
        if why := serve.lacks(part.serves, device=True):
            return None, why
    reasons = []
    for environment in (here, serve):
        if environment is not None:
            if not (why := environment.lacks(part.modules, device=not part.serves)):
                return environment, ""
            reasons.append(why)
    return None, "; ".join(dict.fromkeys(reasons))


def driver() -> str:
    """Version of NVIDIA's driver; empty without nvidia-smi."""
    return _query("driver_version")


def capability() -> str:
    """Compute capability of the first GPU, such as 9.0; empty without nvidia-smi."""
    return _query("compute_cap")


def _query(field: str) -> str:
    return next(iter(_lines(field)), "")


def _lines(field: str) -> list[str]:
    """A line of each GPU."""
    smi = shutil.which("nvidia-smi")
    if smi is None:
        return []
    command = [smi, f"--query-gpu={field}", "--format=csv,noheader"]
    try:
        text = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout
    except (subprocess.SubprocessError, OSError):
        return []
    return [line.strip() for line in text.splitlines() if line.strip()]
