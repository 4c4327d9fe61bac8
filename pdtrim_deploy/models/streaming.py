"""A model whose blocks' weights stay in the checkpoint until they run: so many blocks are in memory at most.

The modules are transformers' own, made without weights. When one of a block's modules is called, the block's tensors
are read from their safetensors shards and cast; the module has them for the time of the call; they go, the least
recently used first, when another block needs the room. So whatever only calls modules (`Blockwise`, the PD oracle,
stages of `keep_blocks`) runs as on the whole model, to the bit; whatever reads a block's weights by name finds a meta
tensor and fails, unless it asks `whole_block` for a copy.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pdtrim_deploy.local.compute import ON_CPU, Compute
from pdtrim_deploy.models.block_store import Blocks, read_tensors
from pdtrim_deploy.models.checkpoint import Checkpoint
from pdtrim_deploy.models.loading import TORCH_DTYPES
from pdtrim_deploy.models.placement import device_of, put


def stream_model(
    checkpoint: Checkpoint, blocks_in_memory: int, compute: Compute = ON_CPU, rounded: str | None = None
) -> tuple[Any, Blocks]:
    """What `load_model` gives, but for the blocks' weights, which come and go; and who fetches them.

    Embedding, final norm and LM head are in the memory of the first of `compute.devices`. Weights are `rounded` to that
    dtype before they are cast to `compute.dtype`, if any is named.
    """
    dtype, home = TORCH_DTYPES[compute.dtype], torch.device(compute.devices[0])
    model_class = checkpoint.family.model_class
    config = model_class.config_class.from_dict(checkpoint.config)
    attention = "sdpa" if model_class._supports_sdpa else "eager"
    with torch.device("meta"):
        model = model_class._from_config(config, attn_implementation=attention, dtype=dtype)
    model.model.rotary_emb = type(model.model.rotary_emb)(config=model.config)
    for leaf, buffer in model.model.rotary_emb._buffers.items():
        model.model.rotary_emb._buffers[leaf] = buffer.to(home)
    outside = [name for name in checkpoint.weights if not name.startswith("model.layers.")]
    for name, tensor in read_tensors(checkpoint, outside, dtype, rounded).items():
        owner, _, leaf = name.rpartition(".")
        model.get_submodule(owner)._parameters[leaf] = nn.Parameter(tensor.to(home), requires_grad=False)
    if "lm_head.weight" not in checkpoint.tensors:
        model.lm_head._parameters["weight"] = model.model.embed_tokens.weight
    if (scale := getattr(model.model.embed_tokens, "scalar_embed_scale", None)) is not None:  # Gemma-3's, of no file
        model.model.embed_tokens._buffers["embed_scale"] = torch.tensor(scale, device=home)
    blocks = Blocks(checkpoint, blocks_in_memory, compute, rounded)
    for number, layer in enumerate(model.model.layers):
        put(layer, blocks.device(number))
        _read_buffers(checkpoint, number, layer)
        for inside, module in layer.named_modules():
            names = [name for name, _ in module.named_parameters(recurse=False)]
            if names:
                fetch = _Fetch(blocks, number, {name: f"{inside}.{name}" for name in names})
                module.register_forward_pre_hook(fetch.come)
                module.register_forward_hook(fetch.go, always_call=True)
    return model.eval().requires_grad_(False), blocks


def _read_buffers(checkpoint: Checkpoint, block: int, layer: nn.Module) -> None:
    """Those that the checkpoint holds (a router's correction) are small, and stay in memory."""
    for name, buffer in list(layer.named_buffers()):
        source = f"model.layers.{block}.{name}"
        if buffer.is_meta and source in checkpoint.tensors:
            owner, _, leaf = name.rpartition(".")
            read = read_tensors(checkpoint, [source], buffer.dtype)
            layer.get_submodule(owner)._buffers[leaf] = read[source].to(device_of(layer))


def whole_block(model: Any, block: int) -> nn.Module:
    """A copy of one block with weights of its own, in memory: of a streamed model, or of any other."""
    return own_weights(copy.deepcopy(model.model.layers[block]))


def weight_of(linear: nn.Module) -> Tensor:
    """The weight of a linear map, read from the checkpoint where the model is streamed."""
    weight: Tensor = own_weights(copy.deepcopy(linear)).get_parameter("weight").detach()
    return weight


def own_weights(layer: nn.Module) -> nn.Module:
    """`layer` itself, with weights of its own that stay."""
    for module in layer.modules():
        for handle, hook in list(module._forward_pre_hooks.items()):
            if isinstance(fetch := getattr(hook, "__self__", None), _Fetch):
                fetch.keep(module)
                del module._forward_pre_hooks[handle]
        for handle, hook in list(module._forward_hooks.items()):
            if isinstance(getattr(hook, "__self__", None), _Fetch):
                del module._forward_hooks[handle], module._forward_hooks_always_called[handle]
    return layer


def keep_rows(module: nn.Module, leaf: str, rows: Sequence[int]) -> None:
    """Leave some rows of a parameter or buffer of `module`: in a tensor of their own, or whenever it is fetched.

    Hooks of the module change, so it must not share them with another (`surgery.keep_blocks` makes such copies).
    """
    if (parameter := module._parameters.get(leaf)) is None:
        buffer = module._buffers[leaf]
        assert buffer is not None
        module._buffers[leaf] = buffer[list(rows)]
        return
    shape = (len(rows), *parameter.shape[1:])
    kept = parameter.new_empty(shape) if parameter.is_meta else parameter.detach()[list(rows)]
    module._parameters[leaf] = nn.Parameter(kept, requires_grad=parameter.requires_grad)
    _change(module, lambda fetch: fetch.with_rows(leaf, rows))


def replace_streamed(module: nn.Module, leaf: str, tensor: Tensor) -> None:
    """Let `module` have `tensor` in place of its parameter whenever that is fetched, on the block's device.

    Hooks of the module change, as by `keep_rows`.
    """
    _change(module, lambda fetch: fetch.with_tensor(leaf, tensor))


def _change(module: nn.Module, change: Callable[[_Fetch], _Fetch]) -> None:
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for handle, hook in list(hooks.items()):
            if isinstance(fetch := getattr(hook, "__self__", None), _Fetch):
                hooks[handle] = getattr(change(fetch), hook.__name__)


class _Fetch:
    """Lets a module, and copies of it that share its hooks, have its weights while it is called.

    `rows` gives, by parameter, the rows that it has; of others it has all. `replaced` gives whole parameters that are
    not the checkpoint's.
    """

    def __init__(
        self,
        blocks: Blocks,
        block: int,
        names: dict[str, str],
        rows: Mapping[str, Sequence[int]] | None = None,
        replaced: Mapping[str, Tensor] | None = None,
    ) -> None:
        self._blocks, self._block, self._names = blocks, block, names
        self._rows, self._replaced = rows or {}, replaced or {}

    def with_rows(self, leaf: str, rows: Sequence[int]) -> _Fetch:
        """`rows` of those that it has already."""
        if (before := self._rows.get(leaf)) is not None:
            rows = [before[row] for row in rows]
        return _Fetch(self._blocks, self._block, self._names, {**self._rows, leaf: rows}, self._replaced)

    def with_tensor(self, leaf: str, tensor: Tensor) -> _Fetch:
        """`tensor` as that parameter."""
        return _Fetch(self._blocks, self._block, self._names, self._rows, {**self._replaced, leaf: tensor})

    def __deepcopy__(self, _: Any) -> _Fetch:
        return self  # copies read from the same place

    def come(self, called: nn.Module, _: Any) -> None:
        for leaf, weight in self._empty(called).items():
            called._parameters[leaf] = nn.Parameter(self._tensor(leaf), requires_grad=False)
            setattr(called, _EMPTY, {**getattr(called, _EMPTY, {}), leaf: weight})

    def go(self, called: nn.Module, *_: Any) -> None:
        called._parameters.update(vars(called).pop(_EMPTY, {}))

    def keep(self, module: nn.Module) -> None:
        """Give `module` its weights for good."""
        for leaf in self._empty(module):
            module._parameters[leaf] = nn.Parameter(self._tensor(leaf).clone(), requires_grad=False)

    def _tensor(self, leaf: str) -> Tensor:
        if (replaced := self._replaced.get(leaf)) is not None:
            return replaced.to(self._blocks.device(self._block))
        tensor = self._blocks[self._block][self._names[leaf]]
        return tensor[list(self._rows[leaf])] if leaf in self._rows else tensor

    def _empty(self, module: nn.Module) -> dict[str, nn.Parameter]:
        """Its weights that are not there; others stay: a copy's own."""
        parameters = {leaf: module._parameters[leaf] for leaf in self._names}
        return {leaf: weight for leaf, weight in parameters.items() if weight is not None and weight.is_meta}


_EMPTY = "_pdtrim_empty"
