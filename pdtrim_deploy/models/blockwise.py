"""Run a causal LM through its own modules, one block at a time.

What transformers' `forward` hides and we need: a different KV length for each layer, a start in the middle,
hidden states between blocks. Nothing of a block is re-implemented; the loop is that of `LlamaModel.forward`,
which other families share (transformers 5.14) but for what a config's multipliers do before and behind the blocks. No
import of transformers: the model is handed in.

Blocks may be on several devices (`placement`): hidden states, KV and positions move to the block that reads them; token
ids may always be on the host. Logits are on the device of the LM head.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from pdtrim_deploy.models.latents import keeps_latents, latent_cache
from pdtrim_deploy.models.layer_kv import LayerKV, Ranges, Span
from pdtrim_deploy.models.linear_attention import keeps_state, run_layer
from pdtrim_deploy.models.placement import device_of
from pdtrim_deploy.models.sublayers import has_attention
from pdtrim_deploy.models.vocabulary import in_pieces, token_logprobs

CausalLM: TypeAlias = Any
"""A transformers `*ForCausalLM` built as Llama's is, in eval mode."""

_LOGITS_AT_ONCE = 1 << 24


class Blockwise:
    """The modules of one model, callable one by one. Hidden states are `[batch, tokens, hidden]`.

    Attributes:
        kv_layers: layers that hold K and V, ascending: all but those without attention, or with a linear one.
        state_layers: layers with linear attention, ascending.

    """

    def __init__(self, model: CausalLM) -> None:
        self.model = model
        self.layers = list(model.model.layers)
        self.kv_layers = [at for at, layer in enumerate(self.layers) if has_attention(layer)]
        self.state_layers = [at for at, layer in enumerate(self.layers) if keeps_state(layer)]
        self.devices = [device_of(layer) for layer in self.layers]
        self.home: torch.device = model.model.norm.weight.device
        self.windows = [None if keeps_state(layer) else _window(layer.self_attn) for layer in self.layers]
        self._kinds = _rope_kinds(model)
        self._embedded = getattr(model.config, "embedding_multiplier", None)  # Granite's
        self.logits_scaling = getattr(model.config, "logits_scaling", None)

    def embed(self, ids: Tensor, start: int = 0, branches: int = 1) -> tuple[Tensor, Span]:
        """Input of block 0 for `ids` int64 `[batch, tokens]` at positions `start, start + 1, ...`.

        With `branches`, `ids` is so many alternatives of equal length, one behind the other: each stands at `start`
        and sees what came before and itself, not the others. What a layer then holds cannot be continued.
        """
        hidden = self.model.model.embed_tokens(ids.to(self.home))
        if self._embedded is not None:
            hidden = hidden * self._embedded
        return hidden, self.span(hidden, start, branches)

    def span(self, hidden: Tensor, start: int = 0, branches: int = 1) -> Span:
        """Where the tokens of `hidden` stand: as in `embed`."""
        tokens = hidden.shape[1]
        positions = torch.arange(start, start + tokens // branches, device=self.home).repeat(branches)[None]
        like = hidden.new_empty(0, device=self.home)  # of which device and dtype are read, no more
        rotary = self.model.model.rotary_emb
        by_kind = {kind: {} if kind is None else {"layer_type": kind} for kind in self._kinds}
        angles = {kind: rotary(like, position_ids=positions, **of_kind) for kind, of_kind in by_kind.items()}
        return Span(start, start + tokens, branches, positions, angles)

    def block(
        self, layer: int, hidden: Tensor, span: Span, kv: LayerKV | None = None, student: nn.Module | None = None
    ) -> Tensor:
        """Output of one layer, whose queries see `kv` and, causally, each other; `kv` grows by them.

        A `student` stands in for the layer: a module of its class, run like it.
        """
        device, kv = self.devices[layer], kv if kv is not None else LayerKV()
        hidden, span = hidden.to(device), span.to(device)
        kv.move(device)
        kv.ranges = (*kv.ranges, (span.start, span.stop))
        module: Any = student or self.layers[layer]
        if keeps_state(module):
            out, kv.state = run_layer(module, hidden, kv.state, span.branches)
            return out
        latents = keeps_latents(getattr(module, "self_attn", None))
        with latent_cache(module.self_attn, kv) if latents else nullcontext(kv) as cache:
            return module(
                hidden,
                attention_mask=self._mask(span, kv.ranges, self.windows[layer], hidden.dtype),
                position_ids=span.positions,
                position_embeddings=span.angles[self._kinds[layer]],
                past_key_values=cache,
                use_cache=True,
            )

    def by_layer(self, held: Iterable[LayerKV]) -> list[LayerKV]:
        """What each layer reads, of what each KV layer, then each that keeps a state, holds; others hold nothing."""
        of_layer = dict(zip((*self.kv_layers, *self.state_layers), held, strict=True))
        return [of_layer.get(layer) or LayerKV() for layer in range(len(self.layers))]

    def logits(self, hidden: Tensor) -> Tensor:
        """Next-token logits of the last block's output, in the model's dtype."""
        return self.head(self.normed(hidden))

    def normed(self, hidden: Tensor) -> Tensor:
        """What the LM head reads of the last block's output."""
        return self.model.model.norm(hidden.to(self.home))

    def head(self, normed: Tensor) -> Tensor:
        """Next-token logits of what the final norm gives."""
        logits = self.model.lm_head(normed)
        return logits if self.logits_scaling is None else logits / self.logits_scaling

    @property
    def logits_step(self) -> int:
        """Positions whose logits may be in memory at a time: 64 MiB of float32, or one."""
        return max(1, _LOGITS_AT_ONCE // int(self.model.lm_head.out_features))

    def logprobs(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """float32 `[batch, tokens]`: log-probability of `targets[b, t]` after `hidden[b, t]`.

        At most 64 MiB of float32 logits exist at a time (or those of one token), and far fewer in float32 on a CPU.
        """
        head = self.model.lm_head
        if in_pieces(head):
            normed, ids = self.normed(hidden.flatten(0, 1)), targets.flatten().to(self.home)
            return token_logprobs(head.weight, normed, ids, self.logits_scaling).view(targets.shape)
        flat, flat_targets, step = hidden.flatten(0, 1), targets.flatten(), self.logits_step
        slices = zip(flat.split(step), flat_targets.split(step), strict=True)
        return torch.cat([pick(self.logits(part), ids) for part, ids in slices]).view(targets.shape)

    def _mask(self, span: Span, keys: Ranges, window: int | None, dtype: torch.dtype) -> Tensor | None:
        tokens = span.stop - span.start
        if window is not None and span.stop - keys[0][0] <= window:
            window = None
        if window is None and tokens == 1:
            return None  # one query sees every key
        if window is None and len(keys) == span.branches == 1 and self.model.config._attn_implementation == "sdpa":
            return None  # square and causal: sdpa's own fast path
        if (keys, window) not in span.masks:
            queries, device = span.positions[0], span.positions.device
            at = torch.cat([*(torch.arange(lo, hi, device=device) for lo, hi in keys[:-1]), queries])
            back = queries[:, None] - at
            if span.branches > 1:
                branch = torch.arange(tokens, device=device) // (tokens // span.branches)
                back[:, -tokens:].masked_fill_(branch[:, None] != branch, -1)
            hidden = back < 0 if window is None else (back < 0) | (back >= window)
            mask = torch.zeros(hidden.shape, dtype=dtype, device=at.device)
            span.masks[keys, window] = mask.masked_fill_(hidden, torch.finfo(dtype).min)[None, None]
        return span.masks[keys, window]


def pick(logits: Tensor, targets: Tensor) -> Tensor:
    """float32 `[...]`: log-softmax of `logits[..., vocabulary]` at `targets[...]`, on the device of the logits."""
    logits, targets = logits.float(), targets.to(logits.device)
    return logits.gather(-1, targets[..., None]).squeeze(-1) - logits.logsumexp(-1)


def _rope_kinds(model: CausalLM) -> list[str | None]:
    """By layer, the kind whose RoPE it has; None where all have one."""
    by_kind = isinstance(getattr(model.model.rotary_emb, "rope_type", None), dict)  # Gemma-3's
    return list(model.config.layer_types) if by_kind else [None] * len(model.model.layers)


def _window(attention: Any) -> int | None:
    """Sliding window of an attention module: Qwen keeps it by layer, Mistral in its config; 0 is none."""
    if hasattr(attention, "sliding_window"):
        return attention.sliding_window or None
    return getattr(attention.config, "sliding_window", None) or None
