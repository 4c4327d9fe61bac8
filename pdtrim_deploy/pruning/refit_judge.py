"""What solutions lose once what is left of them is compensated: the `Judge` of a search's finalists."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from pdtrim_deploy.models.blockwise import CausalLM
from pdtrim_deploy.plan import ModelShape, PDPlan, Stage
from pdtrim_deploy.pruning.compensation import WHOLE_MAPS, FitRules, get_compensation
from pdtrim_deploy.pruning.compensation.held_out import halves, held_out
from pdtrim_deploy.pruning.pair import StagePair
from pdtrim_deploy.pruning.pd_loss import pd_kl, pd_loss, prefill_kl, prefill_loss
from pdtrim_deploy.pruning.solution import Solution
from pdtrim_deploy.pruning.teacher import Teacher

VERSION = 3  # raise when finalists are judged otherwise


class StudentTensors(Protocol):
    """Students by their pair."""

    def tensors(self, pair: tuple[int, int]) -> Mapping[str, Tensor]: ...


@dataclass(frozen=True)
class RefitJudge:
    """Compensates by `method` on one half of `ids`, judges on the other, and the other way round.

    What those solutions lose that are compensated side by side is said before others are looked at.
    As a build does, it leaves rescaling (`norm`) out where that does not help; least squares ask that themselves.

    Attributes:
        model, shape: the dense model, float32.
        ids: text, int64 `[S >= 2, T]`; decode is judged behind prompts of T / 2.
        students: what stands for distilled pairs; None where there are none.
        together: solutions compensated side by side, which runs what is around them once for all, and holds what each
            changes; None: all.
        teacher: the dense model's predictions on `ids`, where KL to them is judged; None: NLL of the text.
        rules: of least squares.

    """

    model: CausalLM
    shape: ModelShape
    ids: Tensor
    method: str
    students: StudentTensors | None = None
    note: Callable[[str], None] = lambda _: None
    together: int | None = None
    teacher: Teacher | None = None
    rules: FitRules = WHOLE_MAPS

    def __call__(self, stage: Stage, prefill: Solution, solutions: Sequence[Solution]) -> Iterator[float]:
        """Mean loss of each, nats a token: of all tokens for prefill, of those behind the prompt for decode."""
        before = self._before(prefill) if stage == "decode" else "none"
        losses = self._losses(stage, prefill, solutions, before, self.method)
        if self.method != "norm":
            return losses
        return map(min, losses, self._losses(stage, prefill, solutions, before, "none"))

    def _before(self, prefill: Solution) -> str:
        """What prefill is compensated by when decode is judged behind it."""
        if self.method != "norm" or not prefill.saved:
            return self.method
        pair = self._pair(prefill, prefill)
        return "norm" if held_out(get_compensation("norm"), pair, "prefill", self.ids).kept else "none"

    def _losses(
        self, stage: Stage, prefill: Solution, solutions: Sequence[Solution], compensated: str, method: str
    ) -> Iterator[float]:
        """Of each, prefill `compensated` by that where decode is judged, the stage itself by `method`."""
        first, second = halves(len(self.ids))
        parts = [
            (self.ids[fitted], checked, self._handing_over(stage, prefill, self.ids[fitted], compensated))
            for fitted, checked in ((first, second), (second, first))
        ]
        step = self.together or len(solutions)
        for at in range(0, len(solutions), step):
            some = solutions[at : at + step]
            sums = [0.0] * len(some)
            for fitted, checked, before in parts:
                pairs = [self._pair(lost if stage == "prefill" else prefill, lost) for lost in some]
                pairs = self._compensated(
                    [pair.with_changes("prefill", before) for pair in pairs], stage, fitted, method
                )
                self.note(f"{stage}: {len(pairs)} solutions compensated on {len(fitted)} sequences")
                count = len(self.ids[checked])
                sums = [
                    total + self._loss(stage, pair, checked) * count for total, pair in zip(sums, pairs, strict=True)
                ]
            yield from (total / len(self.ids) for total in sums)

    def _loss(self, stage: Stage, pair: StagePair, rows: slice) -> float:
        """On those sequences, nats a token."""
        ids = self.ids[rows]
        if self.teacher is None:
            return (prefill_loss if stage == "prefill" else pd_loss)(pair, ids)
        return (prefill_kl if stage == "prefill" else pd_kl)(pair, ids, self.teacher[rows])

    def _handing_over(
        self, stage: Stage, prefill: Solution, fitted: Tensor, compensated: str
    ) -> Mapping[int, Mapping[str, Tensor]]:
        """What prefill changes, in front of decode, fitted to half of the text."""
        if stage == "prefill":
            return {}
        (pair,) = self._compensated([self._pair(prefill, prefill)], "prefill", fitted, compensated)
        return pair.changed.get("prefill", {})

    def _compensated(self, pairs: list[StagePair], stage: Stage, ids: Tensor, method: str) -> list[StagePair]:
        """All lose as many blocks, or none loses anything."""
        if method == "none" or all(action.kind == "keep" for action in pairs[0].plan.actions(stage)):
            return pairs
        return get_compensation(method, self.rules).compensate_all(pairs, stage, ids, self.note)

    def _pair(self, prefill: Solution, decode: Solution) -> StagePair:
        """Both stages, with students and no more."""
        blocks = self.shape.num_blocks
        plan = PDPlan.uncut(self.shape, prefill.actions(blocks), decode.actions(blocks))
        pair, lost = StagePair(self.model, plan), {"prefill": prefill, "decode": decode}
        for stage, solution in lost.items():
            for both in solution.pairs:
                assert self.students is not None, "a pair is distilled but there are no students"
                pair = pair.with_changes(stage, {both[0]: self.students.tensors(both)})  # type: ignore[arg-type]
        return pair
