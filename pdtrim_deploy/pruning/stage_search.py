"""The search of one stage, and the judging of its finalists."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch import Tensor

from pdtrim_deploy.models.blockwise import CausalLM
from pdtrim_deploy.plan import Stage
from pdtrim_deploy.pruning.dense_kl import DenseKL
from pdtrim_deploy.pruning.evaluator import MEMORY, Evaluator, InProcess
from pdtrim_deploy.pruning.finalists import Finalist, FinalRound, judge_finalists
from pdtrim_deploy.pruning.objective import NextTokenLoss, StudentLayers
from pdtrim_deploy.pruning.search import NO_COST, Cost, Problem, Progress, Search, SearchResult, Step, Trajectory
from pdtrim_deploy.pruning.search_logs import finalists_log, search_log
from pdtrim_deploy.pruning.solution import Solution
from pdtrim_deploy.pruning.teacher import Teacher
from pdtrim_deploy.pruning.units import Counts
from pdtrim_deploy.recipe.pruning_methods import SEARCH_VERSION


class EvaluatorFactory(Protocol):
    """Makes the evaluator of one search, of `NextTokenLoss(model, ids, prompt_tokens, forced, students)`.

    With a `teacher` it is `DenseKL` instead.
    """

    def __call__(
        self,
        objective: NextTokenLoss,
        ids: Tensor,
        prompt_tokens: int,
        forced: Solution,
        students: StudentLayers | None,
        memory: int,
        teacher: Teacher | None = None,
    ) -> Evaluator: ...


@dataclass(frozen=True)
class SearchInputs:
    """What the searches of both stages share.

    Attributes:
        model, ids: the dense model and calibration text, int64 `[S, T]`.
        protected: blocks that must stay.
        pairs, students: the distillation set by first blocks, and what its pairs become.
        memory, disk: bytes of hidden states kept in memory and in mapped files, at most.
        folder: where each search leaves its logs (`search_logs`), and goes on from them, and where those mapped files
            are; None: nowhere, and in the system's temporary folder.
        about: what else the answer depends on (JSON): the model, how students are made.
        evaluator_factory: makes what evaluates solutions; None: this process does.
        final_round: who decides between the finalists of each search; None: the search's own answer stands.
        teacher: the dense model's predictions on `ids`, where searches keep KL to them low; None: NLL of the text.

    """

    model: CausalLM
    ids: Tensor
    search: Search
    protected: frozenset[int] = frozenset()
    pairs: tuple[int, ...] = ()
    students: StudentLayers | None = None
    memory: int = MEMORY
    disk: int = 0
    folder: Path | None = None
    about: object = None
    evaluator_factory: EvaluatorFactory | None = None
    final_round: FinalRound | None = None
    teacher: Teacher | None = None

    @property
    def key(self) -> list[object]:
        """All that a search's answer depends on besides its own question, as JSON."""
        text = hashlib.sha256(f"{tuple(self.ids.shape)}".encode() + self.ids.numpy().tobytes()).hexdigest()
        key = [SEARCH_VERSION, self.about, text, repr(self.search), sorted(self.protected), self.pairs]
        return key if self.teacher is None else [*key, "kl"]

    def objective(self, prompt_tokens: int, forced: Solution, charged: bool) -> NextTokenLoss:
        """What a search keeps low; it counts the cost of the teacher where `charged`."""
        question = self.model, self.ids, prompt_tokens, forced, self.students
        if self.teacher is None:
            return NextTokenLoss(*question)
        return DenseKL(*question, teacher=self.teacher, charged=charged)

    def trajectory(self, file: str, *about: object) -> Trajectory:
        """The log of that name, about these inputs and `about`."""
        return Trajectory(self.folder / file if self.folder else None, [*self.key, *about])

    def evaluator(
        self, objective: NextTokenLoss, prompt_tokens: int, forced: Solution, progress: Progress
    ) -> Evaluator:
        """Evaluates solutions that lose at least `forced`."""
        if self.evaluator_factory is None:
            return InProcess(objective, self.memory, self.disk, self.folder, progress)
        return self.evaluator_factory(
            objective, self.ids, prompt_tokens, forced, self.students, self.memory, self.teacher
        )


@dataclass(frozen=True)
class StageChoice:
    """What one stage loses in the end.

    Attributes:
        removed: units in order of removal; what prefill lost comes first.
        loss: on calibration text, as the search has it, nats a token; None where the method measures none.
        steps: one for each unit that this stage's search saved.
        finalists: best first in the judge's eyes; none where there was nothing to judge.

    """

    removed: tuple[int, ...] = ()
    distilled: tuple[int, ...] = ()
    loss: float | None = None
    steps: tuple[Step, ...] = ()
    cost: Cost = NO_COST
    finalists: tuple[Finalist, ...] = ()

    @property
    def solution(self) -> Solution:
        """The same in order of blocks."""
        return Solution.of(self.removed, self.distilled)


@dataclass(frozen=True)
class StageSearch:
    """What one search came to.

    Attributes:
        forced: what was lost from the start.
        result: by the search itself.
        finalists: best first; none where there was nothing to judge.
        cost: of the search and of evaluating its finalists.

    """

    forced: Solution
    result: SearchResult
    finalists: tuple[Finalist, ...]
    cost: Cost

    @property
    def best(self) -> Solution:
        """The judge's first, or the search's answer."""
        return self.finalists[0].solution if self.finalists else self.result.solution

    @property
    def start(self) -> Solution:
        """Where the search began, before any annealing; its own answer where it does not anneal."""
        return self.result.others[0] if self.result.others else self.result.solution

    def choice(self, solution: Solution, before: tuple[int, ...] = (), others: Cost = NO_COST) -> StageChoice:
        """`solution`, one of the finalists or the search's answer, as the stage's choice.

        Args:
            before: what is forced, in order of removal.
            others: cost of other searches made for this choice.

        """
        cost = self.cost + others
        judged = next((finalist for finalist in self.finalists if finalist.solution == solution), None)
        loss = judged.loss if judged else self.result.loss
        if solution == self.result.solution:
            removed, steps = self.result.removed[len(self.forced.removed) :], self.result.trajectory
        else:  # in no order: it came as a whole
            removed = tuple(block for block in solution.removed if block not in self.forced.removed)
            pairs = [first for first in solution.distilled if first not in self.forced.distilled]
            saved = [*enumerate((*removed, *pairs), 1)]
            steps = tuple(
                Step(n, block, loss if n == len(saved) else None, cost.seconds, cost.block_forwards)
                for n, block in saved
            )
        return StageChoice((*before, *removed), solution.distilled, loss, steps, cost, self.finalists)


def search_stage(
    inputs: SearchInputs,
    stage: Stage,
    name: str,
    remove: Counts,
    prompt_tokens: int,
    forced: Solution,
    progress: Progress,
) -> StageSearch:
    """Save `remove`, `forced` among it; logged under `name`.

    Raises:
        UserError: more to remove than there is, loss not a number.

    """
    blocks, sublayers = remove.blocks, remove._replace(blocks=0)
    question: list[object] = [blocks, prompt_tokens, vars(forced), *([sublayers] if sublayers.total else [])]
    trajectory = inputs.trajectory(search_log(name), *question)
    objective = inputs.objective(prompt_tokens, forced, charged=stage == "prefill" or not forced.saved)
    evaluator = inputs.evaluator(objective, prompt_tokens, forced, progress)
    problem = Problem(
        inputs.model, inputs.ids, objective, blocks, forced, inputs.protected, inputs.pairs, trajectory, evaluator,
        sublayers,
    )  # fmt: skip
    result = inputs.search.run(problem, progress)
    if inputs.final_round is None:
        return StageSearch(forced, result, (), result.cost)
    solutions = [vars(solution) for solution in (result.solution, *result.others)]
    baselines = [[*inputs.final_round.baselines]] if inputs.final_round.baselines else []
    log = inputs.trajectory(finalists_log(name), *question, inputs.final_round.count, *baselines, solutions)
    finalists, judging = judge_finalists(stage, problem, result, inputs.final_round, log, progress)
    return StageSearch(forced, result, finalists, result.cost + judging)
