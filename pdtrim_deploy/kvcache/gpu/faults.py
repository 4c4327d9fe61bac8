"""Flags by which kernels say that a slot lay outside its pool, read when a chunk's event has come.

Each thread has one for each device. Where a thread queues chunks and another one waits for them, each chunk is given a
flag of its own (`use`): so a chunk's fault is never taken for another's.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor


class _OfThread(threading.local):
    """Which flags this thread's kernels write."""

    def __init__(self) -> None:
        self.flags: dict[torch.device, Tensor] = {}


_of_thread = _OfThread()


def new_flag(device: torch.device) -> Tensor:
    """int32 `[1]` in host memory, which kernels of this device can write; pinned where there is a GPU."""
    return torch.zeros(1, dtype=torch.int32, pin_memory=device.type == "cuda" and torch.cuda.is_available())


def flag_of(device: torch.device) -> Tensor:
    """What kernels write that this thread launches on a device from now on."""
    if device not in _of_thread.flags:
        _of_thread.flags[device] = new_flag(device)
    return _of_thread.flags[device]


def use(device: torch.device, flag: Tensor) -> None:
    """From now on kernels that this thread launches on a device write `flag`."""
    _of_thread.flags[device] = flag


def check(flag: Tensor) -> None:
    """Raise IndexError, once, where a kernel has written the flag."""
    if flag.item():
        flag.zero_()
        raise IndexError("a slot of a prompt lay outside its pool; its rows were not moved")
