"""Teach one block what a pair of blocks does: min |B'(x_i) - x_{i+2}|^2 / |x_{i+2}|^2 over cached hidden states.

The student stands at block i, and what makes its K and V is block i's own and frozen: input norm, K and V
projections (with their biases) and K norm. So the prompt KV that prefill's block i sends is exactly the student's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from time import monotonic
from typing import Any

import torch
from torch import Tensor, nn

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.models.blockwise import Blockwise, CausalLM
from pdtrim_deploy.models.placement import device_of
from pdtrim_deploy.models.streaming import whole_block
from pdtrim_deploy.models.surgery import keep_blocks
from pdtrim_deploy.pruning.least_squares import Refit, set_down
from pdtrim_deploy.recipe.healing import StudentsSection

FROZEN = ("input_layernorm.", "self_attn.k_proj.", "self_attn.v_proj.", "self_attn.k_norm.")
"""Starts of the names of tensors that K and V are made with; training touches them in KV-only blocks alone."""

_CHECKED = 8  # one sequence in so many is kept from fitting, for choosing


@dataclass(frozen=True)
class TrainedStudent:
    """A student and how it came about; errors are relative and squared, on sequences that were not fitted.

    Attributes:
        start: which parent it began as.
        error_drop: of block i alone, as it was; error_fit: after least squares; error: of the student given.

    """

    layer: nn.Module
    start: str
    error_drop: float
    error_fit: float
    error: float
    steps: int


def trainable(layer: nn.Module) -> dict[str, nn.Parameter]:
    """What may be trained, by name: all but what K and V are made with."""
    return {name: p for name, p in layer.named_parameters() if not name.startswith(FROZEN)}


def starts(model: CausalLM, block: int) -> dict[str, nn.Module]:
    """Blocks to begin as: the first parent, or its attention before the second's MLP; float32, where the first is."""
    layers = (whole_block(model, index).float() for index in (block, block, block + 1))
    first, crossed, second = (layer.to(device_of(model.model.layers[block])) for layer in layers)
    for name in ("mlp", "post_attention_layernorm"):
        setattr(crossed, name, getattr(second, name))
    return {"first": first, "second-mlp": crossed}


def teach(
    model: CausalLM,
    block: int,
    inputs: Tensor,
    targets: Tensor,
    section: StudentsSection,
    note: Callable[[str], None] = lambda _: None,
) -> TrainedStudent:
    """The student of `(block, block + 1)`; `inputs`, `targets` are `x_i` and `x_{i+2}`, float32 `[S, T, hidden]`.

    Of `model` its rotary embedding and the two layers are used, no others.

    Raises:
        UserError: an error that is not a number.

    """
    checked = max(1, len(inputs) // _CHECKED)
    fit, check = slice(0, max(1, len(inputs) - checked)), slice(len(inputs) - checked, len(inputs))
    best: tuple[float, str, Any] | None = None
    drop = math.nan
    for name, layer in starts(model, block).items():
        runner = _alone(model, block, layer)
        refit = Refit(runner, 0)
        for part, isolated in ((fit, False), (check, True)):
            for x, y in zip(inputs[part].split(4), targets[part].split(4), strict=True):
                refit.add(x, runner.span(x), y, isolated)
        weight, before, after = refit.solve()
        drop = before if name == "first" else drop
        if not math.isfinite(after):
            raise UserError(f"student of blocks {block} and {block + 1}: its error is {after}; load it in float32")
        if best is None or after < best[0]:
            set_down(layer, weight)
            best = (after, name, layer)
    assert best is not None
    error_fit, start, layer = best
    error, steps = _descend(_alone(model, block, layer), inputs, targets, (fit, check), error_fit, section, block, note)
    return TrainedStudent(layer.eval().requires_grad_(False), start, drop, error_fit, error, steps)


def _descend(
    runner: Blockwise,
    inputs: Tensor,
    targets: Tensor,
    parts: tuple[slice, slice],
    error: float,
    section: StudentsSection,
    block: int,
    note: Callable[[str], None],
) -> tuple[float, int]:
    """AdamW with a cosine schedule; keeps the result only if it is better on the checked sequences."""
    if not section.steps:
        return error, 0
    layer, (fit, check) = runner.layers[0], parts
    before = {name: p.detach().clone() for name, p in trainable(layer).items()}
    for parameter in trainable(layer).values():
        parameter.requires_grad_(True)
    optimiser = torch.optim.AdamW(trainable(layer).values(), lr=section.learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda n: rate(n, section.steps))
    generator = torch.Generator().manual_seed(section.seed + block)
    began, done = monotonic(), 0
    while done < section.steps and (section.minutes is None or monotonic() - began < 60 * section.minutes):
        rows = torch.randint(fit.start, fit.stop, (section.batch,), generator=generator)
        loss = _error(runner, inputs[rows], targets[rows])
        if not math.isfinite(value := float(loss.detach())):
            raise UserError(
                f"student of blocks {block} and {block + 1}: the loss is {value} at step {done}; "
                f"lower students.learning_rate, now {section.learning_rate:g}"
            )
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trainable(layer).values(), 1.0)
        optimiser.step()
        schedule.step()
        done += 1
        note(f"student of blocks {block} and {block + 1}: step {done}/{section.steps}, error {value:.5f}")
    with torch.no_grad():
        pieces = zip(inputs[check].split(4), targets[check].split(4), strict=True)
        losses = [(_error(runner, x, y), len(x)) for x, y in pieces]
    after = float(sum(value * n for value, n in losses)) / sum(n for _, n in losses)
    if after < error:
        return after, done
    for name, parameter in trainable(layer).items():
        parameter.data.copy_(before[name])
    return error, done


def _error(runner: Blockwise, x: Tensor, y: Tensor) -> Tensor:
    """Mean over tokens of |B'(x) - y|^2 / |y|^2."""
    out = runner.block(0, x, runner.span(x))
    y = y.to(out.device)
    return ((out - y).square().sum(-1) / y.square().sum(-1)).mean()


def rate(step: int, steps: int) -> float:
    """Share of the learning rate: a tenth of the steps to warm up, then a cosine."""
    warm = max(1, steps // 10)
    return min(1.0, (step + 1) / warm) * 0.5 * (1 + math.cos(math.pi * step / steps))


def _alone(model: CausalLM, block: int, layer: nn.Module) -> Blockwise:
    """The model with that layer alone, standing for `block`."""
    cut = keep_blocks(model, [block])
    layer.self_attn.layer_idx = 0  # type: ignore[union-attr]
    cut.model.layers = nn.ModuleList([layer])
    return Blockwise(cut)
