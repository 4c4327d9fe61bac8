"""What solutions lose once what is left of them is compensated: the `Judge` of a search's finalists."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from pdtrim_deploy.blockwise import CausalLM
from pdtrim_deploy.plan import KVSend, ModelShape, PDPlan, Stage
from pdtrim_deploy.pruning.compensation import get_compensation
from pdtrim_deploy.pruning.pair import StagePair
from pdtrim_deploy.pruning.pd_loss import pd_loss, prefill_loss
from pdtrim_deploy.pruning.solution import Solution


class StudentTensors(Protocol):
    """Students by their pair."""

    def tensors(self, pair: tuple[int, int]) -> Mapping[str, Tensor]: ...


@dataclass(frozen=True)
class Refitted:
    """Compensates by `method` on one half of `ids`, judges on the other, and the other way round.

    Attributes:
        model, shape: the dense model, float32.
        ids: text, int64 `[S >= 2, T]`; decode is judged behind prompts of T / 2.
        students: what stands for distilled pairs; None where there are none.

    """

    model: CausalLM
    shape: ModelShape
    ids: Tensor
    method: str
    students: StudentTensors | None = None
    note: Callable[[str], None] = lambda _: None

    def __call__(self, stage: Stage, prefill: Solution, solutions: Sequence[Solution]) -> list[float]:
        """Mean loss of each, nats a token: of all tokens for prefill, of those behind the prompt for decode."""
        halves = self.ids[0::2], self.ids[1::2]
        sums = [0.0] * len(solutions)
        for fitted, checked in (halves, halves[::-1]):
            before = {} if stage == "prefill" else self._mended(self._pair(prefill, prefill), "prefill", fitted).changed
            for at, solution in enumerate(solutions):
                pair = self._pair(solution if stage == "prefill" else prefill, solution)
                pair = pair.with_changes("prefill", before.get("prefill", {}))
                loss = prefill_loss if stage == "prefill" else pd_loss
                sums[at] += loss(self._mended(pair, stage, fitted), checked) * len(checked)
                self.note(f"{stage}: {solution} compensated on {len(fitted)} sequences")
        return [total / len(self.ids) for total in sums]

    def _mended(self, pair: StagePair, stage: Stage, ids: Tensor) -> StagePair:
        if len(pair.plan.layers(stage)) == self.shape.num_blocks:
            return pair
        return get_compensation(self.method).compensate(pair, stage, ids, lambda _: None)

    def _pair(self, prefill: Solution, decode: Solution) -> StagePair:
        """Both stages, with students and no more."""
        blocks = self.shape.num_blocks
        kv = (KVSend(),) * len(decode.route(blocks))
        plan = PDPlan(model=self.shape, prefill=prefill.actions(blocks), decode=decode.actions(blocks), kv=kv)
        pair, lost = StagePair(self.model, plan), {"prefill": prefill, "decode": decode}
        for stage, solution in lost.items():
            for both in solution.pairs:
                assert self.students is not None, "a pair is distilled but there are no students"
                pair = pair.with_changes(stage, {both[0]: self.students.tensors(both)})  # type: ignore[arg-type]
        return pair
