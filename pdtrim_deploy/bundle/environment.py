"""Where a figure was measured: machine and versions."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = (
    *("pdtrim-deploy", "torch", "transformers", "safetensors", "numpy", "gguf", "sglang", "sglang-router"),
    *("onnx", "onnxruntime", "onnxruntime-extensions", "tensorrt-rtx", "tensorrt", "nvidia-modelopt", "peft"),
)


def versions() -> dict[str, str]:
    """Python's version and that of each of our packages installed in this environment."""
    installed = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            installed[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return installed


def versions_of(python: Path) -> dict[str, str]:
    """The same for another environment's Python, which need not have this package."""
    run = subprocess.run([str(python), "-c", _ASK, *PACKAGES], check=True, capture_output=True, text=True)
    return json.loads(run.stdout)


_ASK = """
import json, platform, sys
from importlib import metadata
found = {d.metadata["Name"].lower(): d.version for d in metadata.distributions()}
print(json.dumps({"python": platform.python_version()} | {n: found[n] for n in sys.argv[1:] if n in found}))
"""


def machine() -> dict[str, Any]:
    """CPU model, cores that we may use, memory in GiB, operating system."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(memory, 1),
        "system": f"{platform.system()} {platform.machine()}",
    }


def environment(command: str) -> dict[str, Any]:
    """The provenance that every result records: the command, the machine, the versions."""
    return {"command": command, "machine": machine(), "versions": versions()}


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
