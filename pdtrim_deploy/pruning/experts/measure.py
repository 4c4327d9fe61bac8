"""Watch a stage's experts at work: which tokens reach them, and how much they add to the hidden state."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pdtrim_deploy.models.families import known_family
from pdtrim_deploy.plan import ExpertShape
from pdtrim_deploy.pruning.experts.base import ExpertUse


class Meter:
    """Of one module of stacked experts. It counts while it is attached.

    The norm of an expert's output is not to be had from the module, which adds outputs up; so the module is called once
    more for each expert, with that expert's tokens alone and a weight of 1.
    """

    def __init__(self, experts: int) -> None:
        self.use, self._experts, self._busy = ExpertUse.none(experts), experts, False

    @torch.no_grad()
    def __call__(self, module: nn.Module, inputs: tuple[Tensor, Tensor, Tensor], _: Any) -> None:
        """A forward hook; `inputs` are hidden states `[tokens, hidden]`, experts and router weights `[tokens, k]`."""
        if self._busy:
            return
        hidden, chosen, weights = inputs
        tokens, norms = torch.zeros(self._experts, dtype=torch.int64), torch.zeros(self._experts, dtype=torch.float64)
        self._busy = True
        try:
            for expert in chosen.unique().tolist():
                row, place = torch.where(chosen == expert)
                output = module(hidden[row], chosen[row, place][:, None], torch.ones_like(weights[row, place])[:, None])
                weighted = output.double().norm(dim=-1) * weights[row, place].double()
                tokens[expert], norms[expert] = len(row), float(weighted.sum())
        finally:
            self._busy = False
        self.use = self.use + ExpertUse(tokens, norms)


@contextmanager
def metered(model: Any, blocks: Sequence[int], shape: ExpertShape) -> Iterator[Mapping[int, Meter]]:
    """A meter for each block with experts of a stage model that runs `blocks`; they are taken off in the end."""
    family = known_family(type(model).__name__)
    assert family.blocks is not None
    assert family.blocks.experts is not None
    owner = next(iter(family.blocks.experts.stacked)).rpartition(".")[0]
    meters, handles = dict[int, Meter](), []
    try:
        for layer, block in zip(model.model.layers, blocks, strict=True):
            if block >= shape.first_block:
                meters[block] = Meter(shape.count)
                handles.append(layer.get_submodule(owner).register_forward_hook(meters[block]))
        yield meters
    finally:
        for handle in handles:
            handle.remove()
