"""Two GPUs that are only said to be there: tensors tagged "cuda:0" or "cuda:1", computed on the CPU bit for bit.

Inside `PretendedDevices` whatever is created on or moved to such a device is tagged, and so is what comes of it. What
CUDA refuses fails: operations on tensors of two devices (but for copies, an index of the host, and single numbers of
the host), writing into a tensor of the host, `numpy()`. So a program that passes moves its data as on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

HOST = torch.device("cpu")
_plainly = torch._C.DisableTorchFunctionSubclass
_IN_PLACE = ("__iadd__", "__isub__", "__imul__", "__itruediv__")


class Tagged(Tensor):
    """A tensor on a pretended GPU."""

    place: torch.device

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if (answer := _says(func, args[0] if args else None)) is not None:
            return answer
        if func is torch._has_compatible_shallow_copy_type:  # Module.to asks, and makes another parameter
            return False
        if func in (Tensor.numpy, Tensor.__array__):
            raise TypeError("can't convert a cuda tensor to numpy; use cpu() to copy it to host memory first")
        if func is Tensor.__deepcopy__:
            return _copied(args[0], args[1])
        if func in (Tensor.to, Tensor.cpu, Tensor.cuda):
            return _moved(func, args, kwargs)
        device = _device_of_all(func, args, kwargs)
        if kwargs.get("device") is not None:
            device, kwargs = torch.device(kwargs["device"]), kwargs | {"device": HOST}
        with _plainly():
            if func is torch.histc:  # of whole numbers: CUDA alone has it
                result = func(args[0].float(), *args[1:], **kwargs).to(args[0].dtype)
            else:
                result = func(*args, **kwargs)
        return _tagged(result, device)


class OnFirst(Tagged):
    place = torch.device("cuda", 0)


class OnSecond(Tagged):
    place = torch.device("cuda", 1)


_CLASSES = {kind.place: kind for kind in (OnFirst, OnSecond)}


class PretendedDevices(TorchFunctionMode):
    """Within it "cuda:0" and "cuda:1" are there, for tensors."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in (Tensor.to, Tensor.cuda) and not isinstance(args[0], Tagged):
            return _moved(func, args, kwargs)
        device = kwargs.get("device")
        if (
            device is not None
            and torch.device(device).type == "cuda"
            and not any(map(_is_tagged, _tensors([args, kwargs])))
        ):
            return _tagged(func(*args, **kwargs | {"device": HOST}), torch.device(device))
        return func(*args, **kwargs)


def device_of(tensor: Tensor) -> torch.device:
    return tensor.place if isinstance(tensor, Tagged) else HOST


def _is_tagged(tensor: Tensor) -> bool:
    return isinstance(tensor, Tagged)


def _says(func: Any, tensor: Any) -> Any:
    if func == Tensor.device.__get__:
        return tensor.place
    return {Tensor.is_cpu.__get__: False, Tensor.is_cuda.__get__: True}.get(func)


def _copied(tensor: Tagged, memo: dict[int, Any]) -> Tensor:
    if id(tensor) not in memo:
        with _plainly():
            copy = tensor.detach().clone().as_subclass(type(tensor)).requires_grad_(tensor.requires_grad)
        if getattr(tensor, "_is_param", False):
            copy._is_param = True  # type: ignore[attr-defined]
        memo[id(tensor)] = copy
    return memo[id(tensor)]


def _moved(func: Any, args: Any, kwargs: dict[str, Any]) -> Tensor:
    tensor, *rest = args
    target = HOST if func is Tensor.cpu else torch.device("cuda", 0) if func is Tensor.cuda else None
    kept = []
    for value in [*rest, *([kwargs["device"]] if kwargs.get("device") is not None else [])]:
        if isinstance(value, str | torch.device):
            target = torch.device(value)
        elif isinstance(value, Tensor):
            target = device_of(value)
            kept.append(value.dtype)
        else:
            kept.append(value)
    kept = [value for value in kept if value is not None and not isinstance(value, bool)]  # `non_blocking`
    target = device_of(tensor) if target is None else torch.device("cuda", 0) if str(target) == "cuda" else target
    with _plainly():
        # An alias of the same device, as torch's own; else a copy.
        same = target == device_of(tensor)
        cast = {name: value for name, value in kwargs.items() if name != "device"}
        result = tensor.to(*kept, **cast) if kept or cast else tensor
        if same:
            return _tagged(result, target)
        return _tagged((result.clone() if result is tensor else result).as_subclass(Tensor), target)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors([*value.values()])


def _device_of_all(func: Any, args: Any, kwargs: dict[str, Any]) -> torch.device:
    name = getattr(func, "__name__", str(func))
    tensors = list(_tensors([args, kwargs]))
    if name == "copy_" or (name == "__setitem__" and not [*_tensors(args[1])]):
        return device_of(args[0])
    if name == "__getitem__" and isinstance(args[0], Tagged):  # an index may be on the host
        tensors = [tensor for tensor in tensors if device_of(tensor) != HOST]
    with _plainly():
        wide = [tensor for tensor in tensors if tensor.dim() or device_of(tensor) != HOST]
    devices = {device_of(tensor) for tensor in wide}
    if len(devices) > 1:
        raise RuntimeError(f"{name}: tensors on {', '.join(sorted(map(str, devices)))}")
    written = kwargs.get("out") if kwargs.get("out") is not None else args[0] if args else None
    in_place = kwargs.get("out") is not None or name in _IN_PLACE or (name.endswith("_") and name[-2] != "_")
    if in_place and isinstance(written, Tensor) and device_of(written) == HOST and devices - {HOST}:
        raise RuntimeError(f"{name}: writes what is on {devices.pop()} into a tensor of the host")
    return devices.pop() if devices else HOST


def _tagged(result: Any, device: torch.device) -> Any:
    if isinstance(result, Tensor):
        kind = _CLASSES.get(device)
        if kind is None or isinstance(result, kind):
            return result
        parameter = getattr(result, "_is_param", False) or isinstance(result, torch.nn.Parameter)
        with _plainly():
            tagged = result.as_subclass(kind)
            if parameter and tagged.requires_grad and not tagged.is_leaf:
                tagged = result.detach().as_subclass(kind).requires_grad_()
        return tagged
    if isinstance(result, list | tuple):
        items = [_tagged(item, device) for item in result]
        return type(result)(items) if type(result) in (list, tuple) else type(result)(tuple(items))
    return result
