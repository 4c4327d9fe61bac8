"""Threads that use the GPU of the thread that starts them; CUDA gives each a current device of its own, GPU 0 at first.

torch goes by its tensors' device, Triton and whatever asks for the current one do not.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch

HIGH = -1  # CUDA's priority of a stream; 0 is the usual one


def start(name: str, run: Callable[..., None], *arguments: Any) -> threading.Thread:
    """Call `run(*arguments)` in a thread of its own, which ends with the process at the latest.

    On a GPU it has a stream of its own, which goes before others: what moves rows neither waits for a forward pass nor
    for other threads. torch has few of them and hands them out in turn.
    """
    device = torch.cuda.current_device() if torch.cuda.is_initialized() else None

    def on_device() -> None:
        if device is not None:
            torch.cuda.set_device(device)
            torch.cuda.set_stream(torch.cuda.Stream(priority=HIGH))
        run(*arguments)

    thread = threading.Thread(target=on_device, name=f"pdtrim {name}", daemon=True)
    thread.start()
    return thread
