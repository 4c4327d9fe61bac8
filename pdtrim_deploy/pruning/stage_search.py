"""The search of one stage, and the last word on it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

from torch import Tensor

from pdtrim_deploy.models.blockwise import CausalLM
from pdtrim_deploy.plan import Stage
from pdtrim_deploy.pruning.evaluator import MEMORY, Evaluator, InProcess
from pdtrim_deploy.pruning.finalists import Finalist, Judge, judge_finalists
from pdtrim_deploy.pruning.objective import NextTokenLoss, StudentLayers
from pdtrim_deploy.pruning.search import (
    DEFAULTS,
    Problem,
    Progress,
    Search,
    SearchResult,
    Settings,
    Trajectory,
    get_search,
)
from pdtrim_deploy.pruning.solution import Solution

_VERSION = 2  # of how searches go; rows of another are thrown away


class EvaluatorFactory(Protocol):
    """Makes the evaluator of one search, of `NextTokenLoss(model, ids, prompt_tokens, forced, students)`."""

    def __call__(
        self,
        objective: NextTokenLoss,
        ids: Tensor,
        prompt_tokens: int,
        forced: Solution,
        students: StudentLayers | None,
        memory: int,
    ) -> Evaluator: ...


@dataclass(frozen=True)
class StageResult:
    """What one search came to.

    Attributes:
        result: the answer, after the last word.
        start: where the search began, before any annealing; its own answer where it does not anneal.
        finalists: best first; none where there was nothing to judge.

    """

    result: SearchResult
    start: Solution
    finalists: tuple[Finalist, ...] = ()

    def judged(self, judge: Judge, prefill: Solution) -> float:
        """The judge's loss of decode's answer behind `prefill`, nats a token."""
        if self.finalists:
            return self.finalists[0].judged
        (loss,) = judge("decode", prefill, [self.result.solution])
        return loss


@dataclass(frozen=True)
class StageSearch:
    """What the searches of both stages share; the fields are the arguments of `stages.choose_stages`.

    UserError: unknown method.
    """

    model: CausalLM
    ids: Tensor
    method: str | Search = "greedy"
    settings: Settings = DEFAULTS
    protected: frozenset[int] = frozenset()
    pairs: tuple[int, ...] = ()
    students: StudentLayers | None = None
    memory: int = MEMORY
    disk: int = 0
    folder: Path | None = None
    about: object = None
    evaluator_factory: EvaluatorFactory | None = None
    judge: Judge | None = None
    finalists: int = 0

    def __post_init__(self) -> None:
        self._search  # noqa: B018 - an unknown method is refused before anything runs

    @cached_property
    def _search(self) -> Search:
        return get_search(self.method, self.settings) if isinstance(self.method, str) else self.method

    def run(
        self, stage: Stage, name: str, remove: int, prompt_tokens: int, forced: Solution, progress: Progress
    ) -> StageResult:
        """Save `remove` blocks, `forced` among them.

        Written down as it goes in `search-NAME.jsonl`, and what finalists lose in `search-NAME-finalists.jsonl`.

        Raises:
            UserError: more to remove than there is, loss not a number.

        """
        asked = [*self._said, remove, prompt_tokens, vars(forced)]
        trajectory = Trajectory(self._path(f"search-{name}"), asked)
        objective = NextTokenLoss(self.model, self.ids, prompt_tokens, forced, self.students)
        evaluator: Evaluator = InProcess(objective, self.memory, self.disk, self.folder)
        if self.evaluator_factory is not None:
            evaluator = self.evaluator_factory(objective, self.ids, prompt_tokens, forced, self.students, self.memory)
        problem = Problem(
            self.model, self.ids, objective, remove, forced, self.protected, self.pairs, trajectory, evaluator
        )
        found = self._search.run(problem, progress)
        start, finalists = found.others[0] if found.others else found.solution, tuple[Finalist, ...]()
        if self.judge is not None and self.finalists:
            seen = [vars(one) for one in (found.solution, *found.others)]
            log = Trajectory(self._path(f"search-{name}-finalists"), [*asked, self.finalists, seen])
            found, finalists = judge_finalists(stage, problem, found, self.judge, self.finalists, log, progress)
        return StageResult(found, start, finalists)

    def _path(self, name: str) -> Path | None:
        return self.folder / f"{name}.jsonl" if self.folder else None

    @property
    def _said(self) -> list[object]:
        """All that a search's answer depends on, as JSON."""
        text = hashlib.sha256(f"{tuple(self.ids.shape)}".encode() + self.ids.numpy().tobytes()).hexdigest()
        name = self.method if isinstance(self.method, str) else repr(self.method)
        chain = [self.settings.seed, self.settings.steps]  # minutes only say where it ends
        return [_VERSION, self.about, text, name, chain, sorted(self.protected), self.pairs]
