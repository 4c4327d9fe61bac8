"""The steps of healing: a short run for each learning rate, then a long one at the best; each in two phases.

Short runs of a few steps tell nothing: there are none unless each has `LEAST_STEPS`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import monotonic
from typing import Any

import torch
from torch import Tensor, nn

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.pruning.healing.losses import Loss
from pdtrim_deploy.pruning.healing.paired import Split
from pdtrim_deploy.pruning.healing.reader import Reader
from pdtrim_deploy.pruning.healing.state import Position, StateFile
from pdtrim_deploy.pruning.healing.weights import Weights
from pdtrim_deploy.recipe.healing import HealingSection

Note = Callable[[str], None]
Clock = Callable[[], float]
_WARM_UP = 0.1  # share of a phase in which the rate rises


@dataclass(frozen=True)
class Phase:
    """A loss and how many steps it has at most; `until` is the second of the run at which it ends, if time is short."""

    loss: Loss
    steps: int
    until: float | None


class Trainer:
    """Trains `weights` on `text.fit`.

    Args:
        losses: hidden states, then logits.
        steps: of the long run, at most.
        clock: seconds that count against `section.minutes`.

    """

    def __init__(
        self, stage: str, weights: Weights, reader: Reader, losses: tuple[Loss, Loss], text: Split,
        steps: int, section: HealingSection, file: StateFile, note: Note, clock: Clock = monotonic,
    ) -> None:  # fmt: skip
        self._stage, self._weights, self._reader, self._losses, self._text = stage, weights, reader, losses, text
        self._steps, self._section, self._file, self._note = steps, section, file, note
        self._rows = _Rows(len(text.fit), section.batch, section.seed)
        self._rates = [section.learning_rate * factor for factor in section.sweep]
        self._trials = len(self._rates) if section.tries(steps) else 0
        self._position, self._kept = Position(), dict[str, Tensor]()
        self._clock, self._zero = clock, clock()

    def train(self) -> dict[str, Any]:
        """All runs, from where the file has them. What they did, as JSON; `weights` are then those of the long run.

        Raises:
            UserError: a loss that is not a number, at every rate.

        """
        unhealed = self._divergence() if self._section.regression else math.inf
        if (saved := self._file.load()) is not None:
            self._position, self._kept = saved
            self._restore()
        self._zero, position = self._clock() - self._position.seconds, self._position
        while position.run < self._trials:
            rate = self._rates[position.run]
            steps = self._steps // self._section.SHORT
            finite = self._run(rate, steps, self._seconds(1 / self._section.SHORT), unhealed, short=True)
            if finite and position.offset < self._section.LEAST_STEPS:
                self._note(f"{self._heading}: {position.offset} steps in its time tell nothing; no rate is tried")
                position.sweep = []
                self._begin_run(self._trials)
                break
            divergence = self._divergence() if finite else math.inf
            position.sweep.append(divergence if math.isfinite(divergence) else math.inf)
            self._note(f"{self._heading}: learning rate {rate:g}, KL {position.sweep[-1]:.4f} nats")
            self._begin_run(position.run + 1)
        tried = dict(zip(self._rates, position.sweep, strict=False))
        rate = min(tried, key=tried.__getitem__) if tried else self._rates[0]
        if position.run == self._trials:
            left = self._seconds(1.0)
            self._run(rate, self._steps, None if left is None else left - position.run_began, unhealed, short=False)
            position.run += 1
            self._save()
        return {
            "learning_rate": rate,
            "sweep": {f"{r:g}": kl if math.isfinite(kl) else None for r, kl in tried.items()},
            "phases": position.phases,
            "seconds": round(position.seconds, 1),
        }

    def _run(self, rate: float, steps: int, seconds: float | None, unhealed: float, short: bool) -> bool:
        """All phases that are left of one run; False where a short one's loss is not a number."""
        position, share = self._position, self._section.regression
        first = min(round(share * steps), steps - 1)
        until = None if seconds is None else share * seconds
        phases = [Phase(self._losses[0], first, until), Phase(self._losses[1], steps - first, seconds)]
        for phase in phases[position.phase :]:
            if phase.steps and not self._phase(phase, rate, short):
                return False
            if not short and phase.steps:
                done = {"loss": phase.loss.name, "steps": position.step}
                done["seconds"] = round(position.seconds - position.phase_began, 1)
                if phase is phases[0]:
                    done["kept"] = self._divergence() < unhealed
                    if not done["kept"]:
                        self._weights.reset()
                position.phases.append(done)
            position.offset, position.step = position.offset + position.step, 0
            position.phase, position.phase_began = position.phase + 1, self._tick()
            self._kept = {}
        return True

    def _phase(self, phase: Phase, rate: float, short: bool) -> bool:
        position, masters = self._position, self._weights.masters
        optimiser = torch.optim.AdamW(masters, lr=rate, weight_decay=0.0)
        _load_moments(optimiser, masters, self._kept, position.step)
        first, began = position.step, self._clock()
        while position.step < phase.steps:
            share = self._share(phase, (self._clock() - began) / max(1, position.step - first))
            if share >= 1:
                break
            optimiser.param_groups[0]["lr"] = rate * _rate(share, phase.steps)
            rows = self._rows[position.offset + position.step]
            value = phase.loss.backward(self._text.fit[rows])
            if not math.isfinite(value):
                optimiser.zero_grad()
                if short:
                    return False
                raise UserError(
                    f"healing {self._stage}: the loss is {value} at step {position.offset + position.step}; "
                    f"lower healing.learning_rate, now {self._section.learning_rate:g}, or check the model's weights"
                )
            self._weights.pull()
            nn.utils.clip_grad_norm_(masters, 1.0)
            optimiser.step()
            optimiser.zero_grad()
            self._weights.push()
            position.step += 1
            self._tick()
            done, seconds = position.step - first, max(1e-9, self._clock() - began)
            self._note(
                f"{self._heading}, {phase.loss.name}, rate {rate:g}: step {position.step}{self._of(phase)}, loss "
                f"{value:.4f}, {done * self._text.fit[rows].numel() / seconds:.0f} tokens/s, "
                f"{self._left(phase, seconds / done):.0f} s left"
            )
            if self._file.due:
                self._kept = _moments(optimiser, masters)
                self._save()
                self._kept = {}
        return True

    @property
    def _heading(self) -> str:
        trial = f", trial {self._position.run + 1}/{self._trials}" * (self._position.run < self._trials)
        return f"healing {self._stage}{trial}"

    def _of(self, phase: Phase) -> str:
        return f"/{phase.steps}" if phase.until is None else ""

    def _seconds(self, share: float) -> float | None:
        return None if self._section.minutes is None else 60 * self._section.minutes * share

    def _tick(self) -> float:
        self._position.seconds = self._clock() - self._zero
        return self._position.seconds

    def _share(self, phase: Phase, step_s: float) -> float:
        """How much of the phase is over, by steps or by time; 1 where no further step ends in time."""
        position, by_steps = self._position, self._position.step / phase.steps
        if phase.until is None:
            return by_steps
        begins, ends = position.phase_began, position.run_began + phase.until
        now = self._tick()
        if now + step_s / 2 >= ends:
            return 1.0
        return max(by_steps, (now - begins) / (ends - begins))

    def _left(self, phase: Phase, step_s: float) -> float:
        by_steps = (phase.steps - self._position.step) * step_s
        if phase.until is None:
            return by_steps
        return max(0.0, min(by_steps, self._position.run_began + phase.until - self._position.seconds))

    def _begin_run(self, run: int) -> None:
        self._weights.reset()
        position, self._kept = self._position, {}
        position.run, position.phase, position.step, position.offset = run, 0, 0, 0
        position.run_began = position.phase_began = self._tick()
        self._save()

    def _divergence(self) -> float:
        return float(self._reader.divergences(self._text.chosen, self._section.batch).mean())

    def _save(self) -> None:
        masters = {f"master.{n}": master.detach() for n, master in enumerate(self._weights.masters)}
        self._tick()
        self._file.save(self._position, masters | self._kept)

    @torch.no_grad()
    def _restore(self) -> None:
        for number, master in enumerate(self._weights.masters):
            master.copy_(self._kept[f"master.{number}"])
        self._weights.push()


class _Rows:
    """Which sequences each step reads: every one once before any comes again."""

    def __init__(self, sequences: int, batch: int, seed: int) -> None:
        self._sequences, self._batch = sequences, batch
        self._generator, self._orders = torch.Generator().manual_seed(seed), list[Tensor]()

    def __getitem__(self, step: int) -> Tensor:
        """int64 `[batch]`."""
        places = range(step * self._batch, (step + 1) * self._batch)
        while len(self._orders) <= places[-1] // self._sequences:
            self._orders.append(torch.randperm(self._sequences, generator=self._generator))
        return torch.stack([self._orders[place // self._sequences][place % self._sequences] for place in places])


def _rate(share: float, steps: int) -> float:
    """Share of the learning rate: it rises at first, then falls by a cosine."""
    return min(1.0, max(share + 1 / steps, 0.01) / _WARM_UP) * 0.5 * (1 + math.cos(math.pi * share))


def _moments(optimiser: torch.optim.Optimizer, masters: Sequence[nn.Parameter]) -> dict[str, Tensor]:
    return {
        f"{name}.{number}": optimiser.state[master][name]
        for number, master in enumerate(masters)
        for name in ("exp_avg", "exp_avg_sq")
        if master in optimiser.state
    }


def _load_moments(
    optimiser: torch.optim.Optimizer, masters: Sequence[nn.Parameter], kept: dict[str, Tensor], step: int
) -> None:
    for number, master in enumerate(masters):
        if f"exp_avg.{number}" in kept:
            moments = {name: kept[f"{name}.{number}"].to(master.device) for name in ("exp_avg", "exp_avg_sq")}
            optimiser.state[master] = {"step": torch.tensor(float(step)), **moments}
