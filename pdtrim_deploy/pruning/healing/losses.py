"""What healing minimises: first how far hidden states are from the dense model's, then how far predictions are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from pdtrim_deploy.models.layer_run import LayerRun
from pdtrim_deploy.pruning.healing.reader import Reader
from pdtrim_deploy.pruning.healing.stage_reader import StageReader


class Loss(Protocol):
    """A loss that adds its own gradients to the weights that learn."""

    name: str

    def backward(self, ids: Tensor) -> float:
        """The loss of text, int64 `[batch, T]`; its gradients are added to those that are there."""
        ...


class HiddenLoss:
    """Relative squared error of each layer's output, mean over tokens and layers.

    A layer's target is the dense model's hidden state where the stage's next layer reads. Gradients stay within their
    layer, so that one layer's activations are in memory at a time; its input is what the layers before it give now.

    Args:
        learns: which layers do; the others are run.

    """

    name = "hidden states"

    def __init__(self, reader: StageReader, learns: Sequence[bool]) -> None:
        self._reader, self._learns = reader, learns

    def backward(self, ids: Tensor) -> float:
        """As in `Loss`."""
        reader, total = self._reader, 0.0
        state, span, held = reader.begin(ids)
        dense = LayerRun(reader.dense, [ids])
        for number, (learns, (_, after)) in enumerate(zip(self._learns, reader.spans, strict=True)):
            with torch.set_grad_enabled(learns):
                out = reader.layer(number, state.detach(), span, held)
            with torch.no_grad():
                while dense.layer < after:
                    dense.advance()
            if learns:
                target = dense.states[0][:, reader.prompt :].to(out.device).float()
                error = (out.float() - target).square().sum(-1) / target.square().sum(-1)
                loss = error.mean() / sum(self._learns)
                loss.backward()
                total += float(loss.detach())
            state = out.detach()
        return total


class LogitLoss:
    """KL divergence of the stage's next-token distribution from the dense model's, mean over tokens, in nats.

    Logits exist for some tokens at a time, and are gone before the gradients of layers come.
    """

    name = "logits"

    def __init__(self, reader: Reader) -> None:
        self._reader = reader

    def backward(self, ids: Tensor) -> float:
        """As in `Loss`."""
        reader, total, gradients = self._reader, 0.0, []
        dense = reader.dense_hidden(ids).flatten(0, 1)
        hidden = reader.hidden(ids)
        flat = hidden.detach().flatten(0, 1)
        for piece in reader.pieces(len(flat)):
            part = flat[piece].requires_grad_()
            loss = reader.kl(part, dense[piece]).sum() / len(flat)
            loss.backward()
            assert part.grad is not None
            gradients.append(part.grad)
            total += float(loss.detach())
        hidden.backward(torch.cat(gradients).view_as(hidden))
        return total
