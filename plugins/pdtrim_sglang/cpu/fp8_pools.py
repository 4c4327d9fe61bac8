"""fp8 KV pools on a CPU, where SGLang 0.5.23 has them with Intel AMX alone, in one dtype, with scales unknown to plans.

Its pool for GPUs and torch_native attention are torch, so on a CPU they hold and read fp8 rows as well. What forbids it
are questions whether the platform is a CPU, in two places.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


class _NoCpu:
    """SGLang's platform in all but this answer."""

    def __init__(self, platform: Any) -> None:
        self._platform = platform

    def __getattr__(self, name: str) -> Any:
        return getattr(self._platform, name)

    def is_cpu(self) -> bool:
        return False


@contextlib.contextmanager
def as_on_gpus(module: Any) -> Iterator[None]:
    """While it is open, `module` of SGLang takes the platform for no CPU."""
    platform = module.current_platform
    module.current_platform = _NoCpu(platform)
    try:
        yield
    finally:
        module.current_platform = platform
