"""Tensors that say they are on a GPU and refuse what a GPU refuses, computed on the CPU: for code that moves between.

No GPU is needed, and none is simulated: an operation on tensors of both kinds fails, but for copies and `to`.
"""

import threading
from functools import partial

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
_plainly = torch._C.DisableTorchFunctionSubclass
_SAYS = {Tensor.device.__get__: GPU, Tensor.is_cpu.__get__: False, Tensor.is_cuda.__get__: True}


class OnGPU(Tensor):
    """A tensor on the pretended GPU; results of its operations are there too."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in _SAYS:
            return _SAYS[func]
        if func is Tensor.to and any(torch.device(to).type == "cpu" for to in args[1:] if isinstance(to, torch.device)):
            return host(args[0]).clone()
        if func is Tensor.copy_:
            with _plainly():
                args[0].copy_(args[1])
            return args[0]
        _one_device(func, [*args, *kwargs.values()])
        return super().__torch_function__(func, types, args, kwargs)


class PretendedGPU(TorchFunctionMode):
    """Inside it (in this thread), tensors created on or moved to `cuda` are on the pretended GPU."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is Tensor.to and len(args) == 2 and args[1] == GPU:
            return gpu(args[0])
        if func is Tensor.pin_memory:  # which asks for a driver
            return args[0].clone()
        device = kwargs.get("device")
        if device is not None and torch.device(device).type == "cuda":
            return gpu(func(*args, **kwargs | {"device": CPU}))
        return func(*args, **kwargs)


def with_current_devices(monkeypatch):
    """torch.cuda's current device and stream as on a machine with GPUs: one of each per thread. Returns them."""
    thread = threading.local()  # the device is 0 at first
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: getattr(thread, "device", 0))
    monkeypatch.setattr(torch.cuda, "set_device", partial(setattr, thread, "device"))
    monkeypatch.setattr(torch.cuda, "Stream", lambda priority: (thread.device, priority))
    monkeypatch.setattr(torch.cuda, "set_stream", partial(setattr, thread, "stream"))
    return thread


def gpu(tensor):
    """The same numbers, on the pretended GPU."""
    return tensor if isinstance(tensor, OnGPU) else tensor.clone().as_subclass(OnGPU)


def host(tensor):
    """The same numbers, on the CPU."""
    with _plainly():
        return tensor.as_subclass(Tensor)


def _one_device(func, values):
    flat = [item for value in values for item in (value if isinstance(value, list | tuple) else [value])]
    with _plainly():
        tensors = [item for item in flat if isinstance(item, Tensor) and item.dim()]
    if len({isinstance(item, OnGPU) for item in tensors}) > 1:
        raise RuntimeError(f"{func.__name__}: tensors on two devices")
