"""Threads that use the GPU of the thread that starts them; CUDA gives each a current device of its own, GPU 0 at first.

torch goes by its tensors' device, Triton and whatever asks for the current one do not.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch


def start(name: str, run: Callable[..., None], *given: Any) -> None:
    """Call `run(*given)` in a thread of its own, which ends with the process at the latest."""
    device = torch.cuda.current_device() if torch.cuda.is_initialized() else None

    def on_device() -> None:
        if device is not None:
            torch.cuda.set_device(device)
        run(*given)

    threading.Thread(target=on_device, name=f"pdtrim {name}", daemon=True).start()
