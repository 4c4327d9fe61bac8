"""Cut the layers whose cut costs least: PD loss measured with one layer cut at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.kvcache.selection.base import Progress, Request
from pdtrim_deploy.plan import KVSend


class ByMeasuredHarm:
    """The `sparse_layers` least harmful layers; harms are taken one by one and assumed to add up."""

    def __init__(self, batch: int = 4) -> None:
        self.batch = batch

    def choose(self, request: Request, progress: Progress) -> tuple[KVSend, ...]:
        """Rank by `harms`; ties go to the earlier layer."""
        harm = self.harms(request, progress)
        ranked = sorted(range(request.layers), key=lambda layer: (float(harm[layer]), layer))
        return request.sends(ranked[: request.sparse_layers])

    def harms(self, request: Request, progress: Progress) -> Tensor:
        """float64 `[decode layers]`: rise of decode's mean NLL (nats per token) when one layer alone is cut.

        The prompt is prefilled and handed over once; a layer costs a decode pass from that layer on. Memory: KV
        and hidden states of `batch` sequences. UserError when the loss is not a number.
        """
        total = torch.zeros(request.layers, dtype=torch.float64)
        for done, ids in enumerate(request.sequences.split(self.batch)):
            total += self._excess(request, ids)
            progress(f"harm: {min((done + 1) * self.batch, len(request.sequences))}/{len(request.sequences)} sequences")
        if not total.isfinite().all():
            raise UserError("the calibration loss is not a number; load the model in float32, check its weights")
        return total / (len(request.sequences) * (request.sequences.shape[1] - request.prompt_tokens - 1))

    @torch.no_grad()
    def _excess(self, request: Request, ids: Tensor) -> Tensor:
        """float64 `[decode layers]`: summed over the tokens of one batch that decode predicts."""
        oracle, n, layers = request.oracle, request.prompt_tokens, range(request.layers)
        state, decode, targets = oracle.prefill(ids[:, :n]), oracle.decode, ids[:, n + 1 :]
        whole, cut = (oracle.with_kv(request.sends(which)).hand_over(state) for which in ((), layers))
        hidden, span = decode.embed(ids[:, n:-1], n)
        inputs = list[Tensor]()
        for layer in layers:
            inputs.append(hidden)
            hidden = decode.block(layer, hidden, span, whole[layer].fork())
        base, excess = decode.logprobs(hidden, targets), []
        for layer in layers:
            hidden = decode.block(layer, inputs[layer], span, cut[layer].fork())
            for later in layers[layer + 1 :]:
                hidden = decode.block(later, hidden, span, whole[later].fork())
            excess.append((base - decode.logprobs(hidden, targets)).double().sum())
        return torch.stack(excess)
