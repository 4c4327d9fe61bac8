"""SnapKV (arXiv:2404.14469): a prompt's last queries choose which of its rows decode keeps.

A row's score is the mean attention that the last `window` queries pay to it, smoothed over `smooth` neighbours
(section 4.2's average pooling); the window's rows always stay. Published for each KV head by itself; one list for all
heads of a layer is the form that a plan's wire could carry without gaps.

With few rows a layer the window alone fills them, and the first rows, which every query leans on, are lost. With `ends`
the first rows of the plan's rule always stay, and of the last ones at most half of the rule's: the rest is by score.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d

from pdtrim_deploy.kvchoice.attention_mass import watch_attention
from pdtrim_deploy.models.layer_kv import LayerKV
from pdtrim_deploy.models.oracle import PDOracle, PrefillState
from pdtrim_deploy.plan import KVSend


@dataclass(frozen=True)
class ScoredState(PrefillState):
    """`scores`: float32 by KV layer, `[batch, kv_heads, tokens]`."""

    scores: tuple[Tensor, ...] = ()


class SnapKV(PDOracle):
    """An oracle that cuts as many rows of a layer as its plan says, chosen by request in the place of first and last.

    Args:
        oracle: the stage models and the plan; both stages have the same blocks.
        by: "head", as published, or "layer".
        ends: keep the first rows of the plan's rule, and half of its last ones.

    """

    def __init__(
        self, oracle: PDOracle, by: str = "head", window: int = 32, smooth: int = 5, *, ends: bool = False
    ) -> None:
        super().__init__(oracle.prefill_model, oracle.decode_model, oracle.plan)
        self.by, self.window, self.smooth, self.ends = by, window, smooth, ends
        whole = (KVSend(wire_dtype=send.wire_dtype) for send in self.plan.kv)
        self._whole = oracle.with_kv(tuple(whole))

    def prefill_parts(self, parts: Sequence[Tensor]) -> list[PrefillState]:
        """That of `PDOracle`, with the scores of its rows."""
        states = zip(parts, super().prefill_parts(parts), strict=True)
        return [ScoredState(**vars(state), scores=self._scores(prompts, state)) for prompts, state in states]

    @torch.no_grad()
    def _scores(self, prompts: Tensor, state: PrefillState) -> tuple[Tensor, ...]:
        before, heads = state.tokens - self.window, self.plan.model.num_kv_heads
        native = self.with_kv((KVSend(),) * len(self.plan.kv))
        held = [
            LayerKV(kv.keys[:, :, :before], kv.values[:, :, :before], ((0, before),))
            for kv in native.hand_over(state)
            if kv.keys is not None and kv.values is not None
        ]
        scores: list[Tensor] = []

        def add(_layer: int, weights: Tensor) -> None:
            by_head = weights.mean(2).unflatten(1, (heads, -1)).mean(2)  # queries, then the queries of a KV head
            scores.append(avg_pool1d(by_head, self.smooth, 1, self.smooth // 2, count_include_pad=False))

        with watch_attention(self.prefill_model, add):
            self.extend(prompts[:, before:], before, held)
        return tuple(scores)

    @torch.no_grad()
    def hand_over(self, state: PrefillState) -> list[LayerKV]:
        """As many rows of each layer as the plan's, as they come off the wire."""
        if not isinstance(state, ScoredState):
            raise TypeError("a state of `SnapKV.prefill` is needed: it has the scores")
        whole = zip(self._whole.hand_over(state), self.plan.kv, state.scores, strict=True)
        return [self._cut(kv, send, scores.clone()) for kv, send, scores in whole]

    def _cut(self, kv: LayerKV, send: KVSend, scores: Tensor) -> LayerKV:
        tokens = scores.shape[-1]
        rows = send.rows(tokens)
        if rows == tokens or kv.keys is None or kv.values is None:
            return kv
        scores = scores if self.by == "head" else scores.mean(1, keepdim=True).expand_as(scores).clone()
        last = min(self.window, send.n_last // 2) if self.ends else self.window
        scores[..., tokens - last :] = 2.0 + torch.arange(last)  # above all means of attention, the newest first
        if self.ends:
            scores[..., : send.n_first] = torch.inf
        index = scores.topk(rows, dim=-1).indices.sort(-1).values[..., None].expand(-1, -1, -1, kv.keys.shape[-1])
        return LayerKV(kv.keys.gather(2, index), kv.values.gather(2, index), ((0, rows),))

    def list_bytes(self, tokens: int) -> int:
        """Of the row numbers, 16 bits each, that must travel beside the rows of a prompt of `tokens` tokens."""
        lists = self.plan.model.num_kv_heads if self.by == "head" else 1
        return sum(2 * lists * send.rows(tokens) for send in self.plan.kv if send.rows(tokens) < tokens)
