"""For workers with adapters: SGLang 0.5.23 pins host memory for LoRA, which torch refuses without an accelerator.

Imported in the worker's process before SGLang starts. Nothing but the pinning is left out.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch

FACTORIES = ("tensor", "zeros", "empty")


def leave_pinning_out() -> None:
    """From now on tensors of this process, and of those that it forks, are not pinned."""
    torch.Tensor.pin_memory = lambda tensor, *_: tensor  # type: ignore[method-assign]
    for name in FACTORIES:
        setattr(torch, name, _unpinned(getattr(torch, name)))


def _unpinned(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @wraps(factory)
    def make(*args: Any, **options: Any) -> torch.Tensor:
        return factory(*args, **{name: value for name, value in options.items() if name != "pin_memory"})

    return make
