"""Whether this CPU has instructions for bfloat16; without them its arithmetic is slower than that of float32."""

from __future__ import annotations

import re
from pathlib import Path

BF16 = frozenset({"avx512_bf16", "amx_bf16", "bf16"})  # x86, x86 with tiles, ARM
_CPUINFO = Path("/proc/cpuinfo")


def cpu_features(path: Path = _CPUINFO) -> frozenset[str] | None:
    """What Linux says of the processors: x86 calls it flags, ARM Features; None where it says nothing."""
    try:
        match = re.search(r"^(?:flags|Features)\s*:(.*)$", path.read_text(), re.MULTILINE)
    except OSError:
        return None
    return frozenset(match[1].split()) if match else None


def compute_dtype(dtype: str) -> str:
    """What to compute in where `dtype` is asked for: itself, or float32 for a bfloat16 that this CPU only imitates."""
    features = cpu_features() if dtype == "bfloat16" else None
    return "float32" if features is not None and not features & BF16 else dtype
