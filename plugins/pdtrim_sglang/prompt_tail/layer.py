"""One decoder layer of SGLang's for K and V alone, but for the rows of tails, which it runs whole.

Written against the decoder layers of SGLang 0.5.23 (models/llama.py, qwen2.py, qwen3.py), whose residual is in the
batch (layers/layer_boundary/residual).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from types import MethodType
from typing import Any

import torch
from sglang.srt.distributed.utils import get_group_rank_size
from sglang.srt.layers.layer_boundary.residual import batch as residual
from sglang.srt.models.llama import LlamaDecoderLayer
from sglang.srt.models.qwen2 import Qwen2DecoderLayer
from sglang.srt.models.qwen3 import Qwen3DecoderLayer
from torch import Tensor, nn

from pdtrim_sglang.kv_only import WriteKV, ZeroProjection
from pdtrim_sglang.prompt_tail.tails import PromptTails

LAYERS = (LlamaDecoderLayer, Qwen2DecoderLayer, Qwen3DecoderLayer)


class TailedLayer:
    """Stands in for `layer.forward`.

    Rows that are not of a tail pass by unchanged, after K and V of all rows were written with the second tensors. The
    tail then runs SGLang's own layer, as a batch of its own, which writes its K and V over those.

    Raises:
        RuntimeError: the layer is none of `LAYERS`: it takes its residual otherwise, or makes Q, K and V otherwise.

    """

    def __init__(self, layer: Any, second: Mapping[str, Tensor], tails: PromptTails) -> None:
        if type(layer) not in LAYERS:
            raise RuntimeError(
                "pdtrim: the plugin runs tails of prompts whole through SGLang's "
                f"{', '.join(kind.__name__ for kind in LAYERS)} alone, and this model has {type(layer).__name__}: "
                "build the bundle with healing.kv_only_tail 0"
            )
        self._whole: Callable[..., Tensor] = layer.forward
        self._norm = _with(layer.input_layernorm, second, "input_layernorm.")
        self._attention, self._tails = _kv_alone(layer.self_attn, second), tails

    def __call__(
        self, positions: Tensor, hidden_states: Tensor, forward_batch: Any, capture_output: Any = None, **others: Any
    ) -> Tensor:
        """As SGLang's layer: `[T, hidden]`; the residual is in the batch."""
        tail = self._tails.of(forward_batch)
        if tail is not None and tail.everything:
            return self._whole(positions, hidden_states, forward_batch, capture_output=capture_output, **others)
        states = residual.fold(hidden_states, forward_batch)
        if capture_output is not None:
            capture_output(states)
        self._attention(positions=positions, hidden_states=self._norm(states), forward_batch=forward_batch)
        if tail is None:
            return states
        last = residual.set_written(states[tail.rows], tail.batch)
        last = residual.fold(self._whole(positions[tail.rows], last, tail.batch), tail.batch)
        residual.clear(tail.batch)
        return residual.set_written(states.index_copy(0, tail.rows, last), forward_batch)


def _kv_alone(attention: Any, second: Mapping[str, Tensor]) -> Any:
    """SGLang's attention module that writes K and V, made by the second projections, and attends to nothing."""
    alone = _twin(attention)
    if hasattr(attention, "k_norm"):
        alone.k_norm = _with(attention.k_norm, second, "self_attn.k_norm.")
    alone.qkv_proj = SecondProjections(attention, second)
    alone.attn, alone.o_proj = WriteKV(attention.attn), ZeroProjection(attention.o_proj.output_size)
    return alone


class SecondProjections(nn.Module):
    """In the place of SGLang's QKVParallelLinear: K and V of this rank's heads; Q is zero."""

    def __init__(self, attention: Any, second: Mapping[str, Tensor]) -> None:
        super().__init__()
        qkv, self._queries, size = attention.qkv_proj, attention.q_size, attention.kv_size
        rank, _ = get_group_rank_size(qkv.kv_tp_group)
        first = rank // qkv.num_kv_head_replicas * size
        sides = [f"self_attn.{side}_proj" for side in "kv"]
        weights = [second[f"{side}.weight"][first : first + size] for side in sides]
        self.weight: Tensor = torch.cat(weights).to(qkv.weight.device, qkv.params_dtype)
        self.bias: Tensor | None = None
        if qkv.bias is not None:
            firsts = dict(zip(sides, qkv.bias.data[self._queries :].split(size), strict=True))
            biases = [_rows(second.get(f"{side}.bias"), first, firsts[side]) for side in sides]
            self.bias = torch.cat(biases)

    def forward(self, x: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
        """`[T, (heads + 2 * kv_heads) * head_dim]`, and no bias: what SGLang's linear layers return."""
        kv = nn.functional.linear(x, self.weight, self.bias)
        return torch.cat((x.new_zeros(len(x), self._queries), kv), 1), None


def _rows(bias: Tensor | None, first: int, like: Tensor) -> Tensor:
    """Rows of a second bias that this rank has; its first bias, `like`, where there is none."""
    return like if bias is None else bias[first : first + len(like)].to(like)


def _with(norm: Any, second: Mapping[str, Tensor], prefix: str) -> Any:
    """The norm with the second weight, if there is one; it quantises for no projection."""
    twin = _twin(norm)
    vars(twin).pop("_quant_linear", None)
    if (weight := second.get(f"{prefix}weight")) is not None:
        like = norm.weight
        twin.weight = nn.Parameter(weight.to(like.device, like.dtype), requires_grad=False)
    return twin


def _twin(module: Any) -> Any:
    """A copy over the same parameters and modules, whose own can be exchanged.

    SGLang's operators keep the method that they have chosen for their platform: that is the copy's then.
    """
    twin = copy.copy(module)
    for name, value in vars(module).items():
        if isinstance(value, MethodType) and value.__self__ is module:
            vars(twin)[name] = MethodType(value.__func__, twin)
    for name in ("_parameters", "_buffers", "_modules"):
        vars(twin)[name] = dict(vars(module)[name])
    return twin
