"""An evaluator that gives each worker its share of a round's solutions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.local.compute import Compute
from pdtrim_deploy.pruning.objective import NextTokenLoss, StudentLayers
from pdtrim_deploy.pruning.ray_evaluator.start import Workers
from pdtrim_deploy.pruning.ray_evaluator.worker import Layers, Work, Worker
from pdtrim_deploy.pruning.solution import Solution
from pdtrim_deploy.pruning.teacher import Teacher


class OnRay:
    """An `Evaluator` whose workers take a round's solutions in turns; each solution has one worker for good.

    So what a worker knows of a solution (its losses on other batches, hidden states) is never asked of another.
    """

    def __init__(self, actors: list[Any], work: Work, objective: NextTokenLoss, students: StudentLayers | None) -> None:
        import ray

        self.workers, self.blocks, self.batches = len(actors), objective.blocks, objective.batches
        self._actors, self._students, self._charged = actors, students, objective.block_forwards
        shared = ray.put(work)
        self._cost = _answers([actor.prepare.remote(shared) for actor in actors])
        self._known = [set(work.students) for _ in actors]
        self._place: dict[Solution, int] = {}

    @property
    def block_forwards(self) -> int:
        """Blocks run, times sequences, so far, over all workers, and here before they began (a teacher's)."""
        return self._charged + sum(self._cost)

    def evaluate(self, solutions: Sequence[Solution], batch: int) -> list[Tensor]:
        """Losses on one batch, in the order asked; UserError when one is not a number."""
        return self._losses(solutions, batch, screened=False)

    def screen(self, solutions: Sequence[Solution], batch: int) -> list[Tensor]:
        """About these losses, for less: each worker samples the vocabulary as this process would."""
        return self._losses(solutions, batch, screened=True)

    def _losses(self, solutions: Sequence[Solution], batch: int, screened: bool) -> list[Tensor]:
        shares: list[list[int]] = [[] for _ in self._actors]
        for index, solution in enumerate(solutions):
            shares[self._place.setdefault(solution, len(self._place) % self.workers)].append(index)
        pending = {
            number: actor.evaluate.remote(
                part := [solutions[i] for i in shares[number]], batch, self._new(number, part), screened
            )
            for number, actor in enumerate(self._actors)
            if shares[number]
        }
        by_solution: dict[int, Tensor] = {}
        for number, (losses, self._cost[number]) in zip(pending, _answers([*pending.values()]), strict=True):
            by_solution |= {i: torch.from_numpy(array.copy()) for i, array in zip(shares[number], losses, strict=True)}
        return [by_solution[index] for index in range(len(solutions))]

    def _new(self, number: int, solutions: list[Solution]) -> Layers:
        """Students that a worker has not seen."""
        new = {pair for solution in solutions for pair in solution.pairs} - self._known[number]
        self._known[number] |= new
        return _layers_of(self._students, new)

    def settle(self, solution: Solution) -> None:
        """Tell all workers."""
        self._cost = _answers([actor.settle.remote(solution) for actor in self._actors])


def _answers(pending: list[Any]) -> list[Any]:
    """What workers say; UserError when one says so or died."""
    import ray
    from ray.exceptions import RayError, RayTaskError

    try:
        return ray.get(pending)
    except RayTaskError as error:
        if isinstance(error.cause, UserError):
            raise UserError(str(error.cause)) from None
        raise
    except RayError as error:
        raise UserError(
            f"a Ray worker died, perhaps for want of memory ({type(error).__name__}); take fewer --workers and run the "
            "same command again: the search goes on where it was"
        ) from error


def _layers_of(students: StudentLayers | None, pairs: Iterable[tuple[int, int]]) -> Layers:
    return {pair: students.layer(pair) for pair in pairs} if students is not None else {}


class EvaluatorFactory:
    """What `choose_stages` takes: the evaluator of each of its searches, by the same workers of the standing cluster.

    `checkpoint` is read where a worker runs, from the same path; `dtype` is what workers compute in.

    Raises:
        UserError: the cluster has not so many CPUs or GPUs.

    """

    def __init__(self, workers: Workers, checkpoint: Path, dtype: str = "float32") -> None:
        import ray

        has = ray.cluster_resources()
        for resource, each in (("CPU", 1), ("GPU", workers.gpus)):
            if workers.count * each > has.get(resource, 0):
                raise UserError(
                    f"{workers.count} workers with {each:g} {resource} each are asked for, but the Ray cluster has "
                    f"{has.get(resource, 0):g}; lower --workers or --worker-gpus"
                )
        threads = max(1, torch.get_num_threads() // workers.count) if workers.address is None else 1
        remote: Any = ray.remote(num_cpus=1, num_gpus=workers.gpus)(Worker)
        compute = Compute(("cuda:0",) if workers.gpus else ("cpu",), dtype)  # Ray shows a worker its own GPUs alone
        self._actors = [remote.remote(checkpoint, threads, compute) for _ in range(workers.count)]

    def __call__(
        self,
        objective: NextTokenLoss,
        ids: Tensor,
        prompt_tokens: int,
        forced: Solution,
        students: StudentLayers | None,
        memory: int,
        teacher: Teacher | None = None,
    ) -> OnRay:
        """One search's."""
        work = Work(ids, prompt_tokens, forced, _layers_of(students, forced.pairs), memory, teacher)
        return OnRay(self._actors, work, objective, students)
