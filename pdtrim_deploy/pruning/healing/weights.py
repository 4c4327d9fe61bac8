"""What is trained: weights of the layers named, or low-rank additions to their matrices (LoRA, by peft).

Either way the optimiser has float32 tensors, whatever the stage computes in: small changes would be lost in 16 bits.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.models.block_tensors import BlockTensors
from pdtrim_deploy.models.blockwise import CausalLM
from pdtrim_deploy.models.placement import device_of
from pdtrim_deploy.models.streaming import weight_of

Names = Sequence[str]
"""Tensors of one layer, by their name within it."""


class Weights(Protocol):
    """Attributes: masters: what the optimiser changes, float32, each on its layer's device."""

    masters: list[nn.Parameter]

    def pull(self) -> None:
        """Gradients of the stage -> those of the masters."""
        ...

    def push(self) -> None:
        """The masters -> the stage."""
        ...

    def reset(self) -> None:
        """Back to the weights that training begins with."""
        ...

    def tensors(self) -> BlockTensors:
        """What the stage computes with now, by block and name within it, in the model's dtype."""
        ...


class FullWeights:
    """Those weights themselves; the stage has its own copies, and shares the rest with the dense model.

    Args:
        blocks, learnt: by layer of `model`: its number in the dense model, and names of the tensors that are trained.

    """

    def __init__(self, model: CausalLM, blocks: Sequence[int], learnt: Sequence[Names]) -> None:
        self._names: list[tuple[int, str]] = []
        self._origins: list[Tensor] = []
        self._working: list[nn.Parameter] = []
        for block, layer, names in zip(blocks, model.model.layers, learnt, strict=True):
            for name in names:
                origin = layer.get_parameter(name)
                owner, _, leaf = name.rpartition(".")
                working = nn.Parameter(origin.detach().clone())
                layer.get_submodule(owner)._parameters[leaf] = working
                self._names.append((block, name))
                self._origins.append(origin.detach())
                self._working.append(working)
        self.masters = [w if w.dtype == torch.float32 else nn.Parameter(w.detach().float()) for w in self._working]

    def pull(self) -> None:
        """As in `Weights`."""
        for master, working in zip(self.masters, self._working, strict=True):
            if master is not working and working.grad is not None:
                master.grad, working.grad = working.grad.float(), None

    @torch.no_grad()
    def push(self) -> None:
        """As in `Weights`."""
        for master, working in zip(self.masters, self._working, strict=True):
            if master is not working:
                working.copy_(master)

    @torch.no_grad()
    def reset(self) -> None:
        """As in `Weights`."""
        for master, origin in zip(self.masters, self._origins, strict=True):
            master.copy_(origin)
        self.push()

    def tensors(self) -> BlockTensors:
        """As in `Weights`."""
        blocks: dict[int, dict[str, Tensor]] = {}
        for (block, name), working in zip(self._names, self._working, strict=True):
            blocks.setdefault(block, {})[name] = working.detach()
        return blocks


class LoraWeights:
    """Additions of low rank to each of these matrices, which stay as they are.

    Args:
        model: of a streamed one (`models.streaming`) the matrices come from the checkpoint when their layers run.
        rank, seed: of the additions; the seed draws their first factor, the second begins at 0.
        keep: what becomes of each merged matrix, such as `mapped`; by default it stays in memory, where its layer is.

    """

    def __init__(
        self,
        model: CausalLM,
        blocks: Sequence[int],
        learnt: Sequence[Names],
        rank: int,
        seed: int,
        keep: Callable[[Tensor], Tensor] = lambda merged: merged,
    ) -> None:
        peft = _peft()
        linears, stacked = list[str](), list[str]()
        for number, (layer, names) in enumerate(zip(model.model.layers, learnt, strict=True)):
            for name in names:
                owner, _, leaf = name.rpartition(".")
                if layer.get_parameter(name).dim() < 2:
                    continue  # norms and biases have no rank
                if leaf == "weight" and isinstance(layer.get_submodule(owner), nn.Linear):
                    linears.append(f"layers.{number}.{owner}")
                else:
                    stacked.append(f"layers.{number}.{name}")
        config = peft.LoraConfig(
            r=rank, lora_alpha=2 * rank, target_modules=linears, target_parameters=stacked or None, bias="none"
        )
        with torch.random.fork_rng(), warnings.catch_warnings(), _without_meta(model.model, linears):
            warnings.simplefilter("ignore")  # parameters of experts are said to be experimental
            torch.manual_seed(seed)
            peft.inject_adapter_in_model(config, model.model)
        self._layers = dict(zip(blocks, model.model.layers, strict=True))
        self.masters = [p.requires_grad_(True) for name, p in model.model.named_parameters() if ".lora_" in name]
        for master in self.masters:
            if master.dtype != torch.float32:
                master.data = master.data.float()
        self._origins, self._keep = [p.detach().clone() for p in self.masters], keep

    def pull(self) -> None:
        """Nothing: the additions are trained themselves."""

    def push(self) -> None:
        """Nothing: they are the stage's."""

    @torch.no_grad()
    def reset(self) -> None:
        """As in `Weights`."""
        for master, origin in zip(self.masters, self._origins, strict=True):
            master.copy_(origin)

    @torch.no_grad()
    def tensors(self) -> BlockTensors:
        """The matrices with what was added to them, merged in float32."""
        blocks: dict[int, dict[str, Tensor]] = {}
        for block, layer in self._layers.items():
            for name, module in layer.named_modules():
                if hasattr(module, "get_delta_weight"):
                    leaf = getattr(module, "parameter_name", "weight")
                    base = getattr(module.get_base_layer(), leaf)
                    whole = weight_of(module.get_base_layer()) if base.is_meta else base
                    merged = whole.float() + module.get_delta_weight("default").float()
                    blocks.setdefault(block, {})[_plain(f"{name}.{leaf}")] = self._keep(merged.to(base.dtype))
        return blocks


@contextmanager
def _without_meta(model: nn.Module, linears: Sequence[str]) -> Iterator[None]:
    """Linear maps whose weights are not there have one number, seen at every place, on their layer's device meanwhile.

    peft puts additions where the weights are, and draws nothing for those on the meta device.
    """
    named = [(name, model.get_submodule(name)) for name in linears]
    absent = {module: weight for _, module in named if (weight := module.get_parameter("weight")).is_meta}
    for name, module in named:
        if module not in absent:
            continue
        weight = absent[module]
        _, number, *_ = name.split(".")
        device = device_of(model.get_submodule(f"layers.{number}"))
        stand_in = torch.empty(1, dtype=weight.dtype, device=device).expand(weight.shape)
        module._parameters["weight"] = nn.Parameter(stand_in, requires_grad=False)
    try:
        yield
    finally:
        for module, weight in absent.items():
            module._parameters["weight"] = weight


def _plain(name: str) -> str:
    """A tensor's name without peft's wrappers."""
    return name.replace(".base_layer", "")


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise UserError("healing.method lora needs peft: install the build extra, or set it to full") from error
    return peft
