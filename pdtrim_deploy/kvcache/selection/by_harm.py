"""Cut the layers whose cut changes decode's predictions least, as measured through the PD oracle.

Harm is KL(whole prompt KV || cut) of the next-token distribution: the rise of NLL on text that the uncut model itself
finds likely. Having no label noise, its standard error is several times smaller than that of the rise on real text.

A layer's harm depends on which others are cut: what one layer cannot see another may still bring, so alone an early
layer looks dear and a late one cheap. It is measured at both ends, with no other and with every other layer cut, and
interpolated. (Ours; the paper ranks by attention mass.)
"""

from __future__ import annotations

import torch
from torch import Tensor

from pdtrim_deploy.blockwise import LayerKV, Span
from pdtrim_deploy.errors import UserError
from pdtrim_deploy.evaluation.oracle import PDOracle
from pdtrim_deploy.kvcache.selection.base import Progress, Request
from pdtrim_deploy.plan import KVSend


class ByMeasuredHarm:
    """The `sparse_layers` least harmful layers."""

    def __init__(self, batch: int = 4) -> None:
        self.batch = batch

    def choose(self, request: Request, progress: Progress) -> tuple[KVSend, ...]:
        """Rank by `interpolated` harm; ties go to the earlier layer."""
        alone, among = self.harms(request, progress)
        harm = interpolated(alone, among, request.sparse_layers)
        ranked = sorted(range(request.layers), key=lambda layer: (float(harm[layer]), layer))
        return request.sends(ranked[: request.sparse_layers])

    def harms(self, request: Request, progress: Progress) -> tuple[Tensor, Tensor]:
        """What cutting each layer adds to the KL (nats per token) when no other, and when every other, is cut.

        Both float64 `[decode layers]`. The prompt is prefilled and handed over once; a layer costs two decode passes
        from that layer on. Memory: KV, hidden states and one set of logits of `batch` sequences. UserError when
        the logits are not numbers.
        """
        alone, among = (torch.zeros(request.layers, dtype=torch.float64) for _ in range(2))
        done = 0
        for ids in request.sequences.split(self.batch):
            new = self._measure(request, ids)
            alone += new[0]
            among += new[1]
            done += len(ids)
            progress(f"harm: {done}/{len(request.sequences)} sequences")
        if not (alone + among).isfinite().all():
            raise UserError("the model's logits are not numbers; load it in float32 or check its weights")
        tokens = len(request.sequences) * (request.sequences.shape[1] - request.prompt_tokens - 1)
        return alone / tokens, among / tokens

    @torch.no_grad()
    def _measure(self, request: Request, ids: Tensor) -> tuple[Tensor, Tensor]:
        oracle, n, layers = request.oracle, request.prompt_tokens, range(request.layers)
        state = oracle.prefill(ids[:, :n])
        whole, cut = (oracle.with_kv(request.sends(which)).hand_over(state) for which in ((), layers))
        hidden, span = oracle.decode.embed(ids[:, n:-1], n)
        from_whole, out = _inputs(oracle, hidden, span, whole)
        reference = [_log_softmax(oracle, row) for row in out]
        from_cut, out = _inputs(oracle, hidden, span, cut)
        all_cut = _divergence(oracle, reference, out)
        alone, among = [], []
        for layer in layers:
            out = _onward(oracle, from_whole[layer], span, layer, cut, whole)
            alone.append(_divergence(oracle, reference, out))
            out = _onward(oracle, from_cut[layer], span, layer, whole, cut)
            among.append(all_cut - _divergence(oracle, reference, out))
        return torch.stack(alone), torch.stack(among)


def interpolated(alone: Tensor, among: Tensor, sparse_layers: int) -> Tensor:
    """Marginal harm with `sparse_layers` of all layers cut, linear between none and all."""
    share = sparse_layers / len(alone)
    return (1 - share) * alone + share * among


def _inputs(oracle: PDOracle, hidden: Tensor, span: Span, held: list[LayerKV]) -> tuple[list[Tensor], Tensor]:
    """What each decode layer reads, and the last one's output."""
    inputs = list[Tensor]()
    for layer, kv in enumerate(held):
        inputs.append(hidden)
        hidden = oracle.decode.block(layer, hidden, span, kv.fork())
    return inputs, hidden


def _onward(
    oracle: PDOracle, hidden: Tensor, span: Span, layer: int, own: list[LayerKV], others: list[LayerKV]
) -> Tensor:
    """The last layer's output when `layer` reads `own[layer]` and all behind it read `others`."""
    for at in range(layer, len(others)):
        hidden = oracle.decode.block(at, hidden, span, (own if at == layer else others)[at].fork())
    return hidden


def _log_softmax(oracle: PDOracle, hidden: Tensor) -> Tensor:
    return oracle.decode.logits(hidden).float().log_softmax(-1)


def _divergence(oracle: PDOracle, reference: list[Tensor], hidden: Tensor) -> Tensor:
    """float64 scalar: KL(reference || prediction) summed over tokens, one sequence's logits at a time."""
    total = torch.zeros((), dtype=torch.float64)
    for expected, row in zip(reference, hidden, strict=True):
        total += (expected.exp() * (expected - _log_softmax(oracle, row))).sum(dtype=torch.float64)
    return total
