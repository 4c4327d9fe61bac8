"""Logit distillation of one stage from the dense model, by `modelopt.torch.distill` (mode `kd_loss`, 0.47).

Prefill is healed as a whole model. Decode is healed as it serves: on what follows a prompt whose KV the pruned (and
healed) prefill made; whole KV, or as a plan sends it, once there is one. What K and V are made with is frozen in both
stages, so the one's KV stays the other's; so are embeddings, final norm and LM head, which both share with the dense
model.
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
from pdtrim_deploy.models.blockwise import LayerKV
from pdtrim_deploy.plan import Stage
from pdtrim_deploy.pruning.healing.readers import PrefillKV, StageLogits, TeacherLogits
from pdtrim_deploy.pruning.pair import StagePair
from pdtrim_deploy.pruning.students.regression import rate, trainable
from pdtrim_deploy.recipe.healing import HealingSection

_CHECKED = 8  # one sequence in so many is not trained on


@dataclass(frozen=True)
class Healed:
    """`before` and `after` are the mean KL divergence from the dense model, in nats a token, on text not trained on.

    `kept` is False when that did not fall: the stage is then as it was.
    """

    pair: StagePair
    steps: int
    before: float
    after: float
    kept: bool

    @property
    def report(self) -> dict[str, Any]:
        """All but the weights, as JSON."""
        return {"steps": self.steps, "before": self.before, "after": self.after, "kept": self.kept}


@dataclass(frozen=True)
class PromptKV:
    """Prompts of so many tokens, whose KV reaches decode's layers as `held` gives it: int64 `[batch, tokens]` ->."""

    prompt_tokens: int
    held: Callable[[Tensor], list[LayerKV]]


def heal(
    pair: StagePair,
    stage: Stage,
    ids: Tensor,
    section: HealingSection,
    note: Callable[[str], None] = lambda _: None,
    prompt_kv: PromptKV | None = None,
) -> Healed:
    """`pair` with `stage` trained on text `ids`, int64 `[S, T]`: all steps asked for, or until time is up.

    With an `prompt_kv` these are `kv_steps` of decode; without, decode's prompts are T / 2 long and their KV is whole.

    Raises:
        UserError: modelopt is not installed; a loss that is not a number.

    """
    kd = _modelopt()
    model = pair.stage(stage)
    learned = _own(model, [pair.adds(stage, block) for block in pair.plan.layers(stage)])
    with torch.random.fork_rng():
        student: Any = kd.convert(
            StageLogits(model),
            mode=[
                (
                    "kd_loss",
                    {
                        "teacher_model": TeacherLogits(pair.model),
                        "criterion": {("", ""): kd.LogitsDistillationLoss(reduction="none")},
                        "loss_balancer": None,
                    },
                )
            ],
        )
    if stage == "decode" and prompt_kv is None:
        prompt_kv = PromptKV(ids.shape[1] // 2, PrefillKV(pair.stage("prefill"), pair.plan.layer_map))
        steps = section.decode_steps
    else:
        steps = section.kv_steps if prompt_kv else section.prefill_steps
    reader = _Loss(student, prompt_kv)
    checked = max(1, len(ids) // _CHECKED)
    check, fit = ids[-checked:], ids[: max(1, len(ids) - checked)]
    note(f"{stage}: how far from the dense model on {checked} sequences that are not trained on")
    before = reader.mean(check, section.batch)
    trained = _train(reader, fit, learned, stage, steps, section, note)
    after = reader.mean(check, section.batch)
    kd.export(student)
    kept = after < before
    note(f"{stage}: KL from the dense model {before:.4f} -> {after:.4f} nats" + ("" if kept else ", not kept"))
    layers = pair.plan.layers(stage)
    weights = {block: {name: p.detach() for name, p in ps.items()} for block, ps in zip(layers, learned, strict=True)}
    return Healed(pair.with_changes(stage, weights) if kept else pair, trained, before, after, kept)


def _train(
    reader: _Loss,
    fit: Tensor,
    learned: list[dict[str, nn.Parameter]],
    stage: Stage,
    steps: int,
    section: HealingSection,
    note: Callable[[str], None],
) -> int:
    parameters = [p for ps in learned for p in ps.values()]
    optimiser = torch.optim.AdamW(parameters, lr=section.learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: rate(step, steps))
    order, began = _order(len(fit), steps, section), monotonic()
    for step in range(steps):
        if section.minutes is not None and monotonic() - began > 60 * section.minutes:
            return step
        loss = reader(fit[order[step]])
        if not math.isfinite(value := float(loss.detach())):
            raise UserError(
                f"healing {stage}: the loss is {value} at step {step}; "
                f"lower healing.learning_rate, now {section.learning_rate:g}, or check the model's weights"
            )
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        schedule.step()
        left = (monotonic() - began) / (step + 1) * (steps - step - 1)
        note(f"healing {stage}: step {step + 1}/{steps}, KL {value:.4f}, {left:.0f} s left")
    return steps


class _Loss:
    """Mean KL divergence of a batch, through modelopt."""

    def __init__(self, student: Any, prompt_kv: PromptKV | None) -> None:
        self._student, self._arrival = student, prompt_kv  # in eval mode: no dropout

    def __call__(self, ids: Tensor) -> Tensor:
        prompt = self._arrival.prompt_tokens if self._arrival else 0
        held = self._arrival.held(ids[:, :prompt]) if self._arrival else None
        self._student(ids, prompt, held)
        return self._student.compute_kd_loss(loss_reduction_fn=lambda values: values.mean())

    @torch.no_grad()
    def mean(self, ids: Tensor, batch: int) -> float:
        """Over all of `ids`."""
        losses = [(float(self(part)), len(part)) for part in ids.split(batch)]
        return sum(loss * n for loss, n in losses) / len(ids)


def _own(model: Any, adds: list[bool]) -> list[dict[str, nn.Parameter]]:
    """Give the stage its own copies of what is trained (it shares the rest with the teacher), by layer.

    A layer that adds nothing to the hidden state goes on doing so.
    """
    learned = []
    for layer, learns in zip(model.model.layers, adds, strict=True):
        mine = {name: nn.Parameter(p.detach().clone()) for name, p in trainable(layer).items() if learns}
        for name, parameter in mine.items():
            owner, _, leaf = name.rpartition(".")
            layer.get_submodule(owner)._parameters[leaf] = parameter
        learned.append(mine)
    return learned


def _order(sequences: int, steps: int, section: HealingSection) -> Tensor:
    """int64 `[steps, batch]`: every sequence once before any comes again."""
    generator = torch.Generator().manual_seed(section.seed)
    rounds = -(-steps * section.batch // sequences)
    order = torch.cat([torch.randperm(sequences, generator=generator) for _ in range(rounds)])
    return order[: steps * section.batch].view(steps, section.batch)


def _modelopt() -> Any:
    try:
        import modelopt.torch.distill as kd
    except ImportError as error:
        raise UserError(
            "healing needs nvidia-modelopt: install the build extra, or set healing.prefill_steps, decode_steps and "
            "kv_steps to 0"
        ) from error
    return kd
