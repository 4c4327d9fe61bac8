"""Whether this CPU has instructions for bfloat16; without them its arithmetic is slower than that of float32."""

from __future__ import annotations

import re
from pathlib import Path

BF16 = frozenset({"avx512_bf16", "amx_bf16", "bf16"})  # x86, x86 with tiles, ARM
_CPUINFO = Path("/proc/cpuinfo")


def cpu_features(path: Path = _CPUINFO) -> frozenset[str] | None:
    """CPU flags from Linux (`flags` on x86, `Features` on ARM); None if the system does not report them."""
    try:
        match = re.search(r"^(?:flags|Features)\s*:(.*)$", path.read_text(), re.MULTILINE)
    except OSError:
        return None
    return frozenset(match[1].split()) if match else None


def compute_dtype(dtype: str) -> str:
    """The dtype to compute in: `dtype`, or float32 for a bfloat16 that this CPU only emulates."""
    features = cpu_features() if dtype == "bfloat16" else None
    return "float32" if features is not None and not features & BF16 else dtype
