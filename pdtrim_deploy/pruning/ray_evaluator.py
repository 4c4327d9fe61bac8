"""Candidates evaluated by Ray: several processes of this machine, or workers of a cluster, each with its own model.

A worker reads the checkpoint from its folder (safetensors) and makes the objective as this process would; what travels
is solutions out and losses back. Answers depend on (solution, batch) alone, so any number of workers gives the same.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.local.compute import Compute
from pdtrim_deploy.models.placement import device_of
from pdtrim_deploy.pruning.dense_kl import DenseKL
from pdtrim_deploy.pruning.evaluator import InProcess
from pdtrim_deploy.pruning.objective import NextTokenLoss, StudentLayers
from pdtrim_deploy.pruning.solution import Solution
from pdtrim_deploy.pruning.teacher import Teacher

# Read by Ray when it is imported: all of its servers on the loopback interface, nothing reported to anyone.
LOCAL = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_USAGE_STATS_ENABLED": "0"}
OBJECT_STORE = 256 << 20  # bytes: losses are small
Layers: TypeAlias = dict[tuple[int, int], nn.Module]
ATTEMPTS = 3  # Ray gives a node 30 s to start, which a busy machine may not make


def check_installed() -> None:
    """UserError without Ray."""
    if importlib.util.find_spec("ray") is None:
        raise UserError("--workers needs Ray; install it with: pip install 'pdtrim-deploy[ray]'")


@dataclass(frozen=True)
class Workers:
    """How many, with how many GPUs each, in the cluster at `address` (HOST:PORT of its head) or on this machine."""

    count: int
    address: str | None = None
    gpus: float = 0.0


@dataclass(frozen=True)
class Work:
    """One search's objective; `students` are those that `forced` needs, others follow with the solutions."""

    ids: Tensor
    prompt_tokens: int
    forced: Solution
    students: Layers
    memory: int
    teacher: Teacher | None = None


class _Students:
    """`device_of` names the device of a block."""

    def __init__(self, device_of: Callable[[int], torch.device]) -> None:
        self._layers: Layers = {}
        self._device_of = device_of

    def add(self, more: Layers) -> None:
        self._layers |= {pair: layer.to(self._device_of(pair[0])) for pair, layer in more.items()}

    def layer(self, pair: tuple[int, int]) -> nn.Module:
        return self._layers[pair]


class Worker:
    """One process: an `InProcess` over its own copy of the model, in the dtype of the search's own."""

    def __init__(self, checkpoint: Path, threads: int, compute: Compute) -> None:
        torch.set_num_threads(threads)
        self._compute, self._checkpoint = compute, checkpoint

    @cached_property
    def _model(self) -> Any:
        from pdtrim_deploy.models.checkpoint import read_checkpoint
        from pdtrim_deploy.models.on_devices import load_on

        return load_on(read_checkpoint(self._checkpoint), self._compute)

    def prepare(self, work: Work) -> int:
        """For another search; block-forwards so far."""
        self._students = _Students(lambda block: device_of(self._model.model.layers[block]))
        self._students.add(work.students)
        question = self._model, work.ids, work.prompt_tokens, work.forced, self._students
        objective = NextTokenLoss(*question) if work.teacher is None else DenseKL(*question, teacher=work.teacher)
        self._inside = InProcess(objective, work.memory)
        return self._inside.block_forwards

    def evaluate(self, solutions: list[Solution], batch: int, more: Layers) -> tuple[list[Any], int]:
        """(float32 arrays, block-forwards so far); `more` are students yet unknown."""
        self._students.add(more)
        return [losses.numpy() for losses in self._inside.evaluate(solutions, batch)], self._inside.block_forwards

    def settle(self, solution: Solution) -> int:
        """As `Evaluator.settle`; block-forwards so far."""
        self._inside.settle(solution)
        return self._inside.block_forwards


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
        shares: list[list[int]] = [[] for _ in self._actors]
        for index, solution in enumerate(solutions):
            shares[self._place.setdefault(solution, len(self._place) % self.workers)].append(index)
        pending = {
            number: actor.evaluate.remote(
                part := [solutions[i] for i in shares[number]], batch, self._new(number, part)
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


@contextmanager
def cluster(workers: Workers) -> Iterator[None]:
    """Ray for the time of a search: one of our own on 127.0.0.1 that ends with it, or the one at `workers.address`.

    Raises:
        UserError: nothing answers at the address, or Ray does not start.

    """
    if workers.address is None:
        if "ray" in sys.modules and any(os.environ.get(name) != value for name, value in LOCAL.items()):
            raise RuntimeError("ray was imported before: its servers would listen on all interfaces")
        os.environ.update(LOCAL)
    import ray

    options: dict[str, Any] = {"address": workers.address}
    if workers.address is None:
        options = {"address": "local", "num_cpus": workers.count, "include_dashboard": False}
        options |= {"object_store_memory": OBJECT_STORE, "_node_ip_address": "127.0.0.1"}
    _start(ray, options)
    try:
        yield
    finally:
        ray.shutdown()


def _start(ray: Any, more: dict[str, Any]) -> None:
    for left in reversed(range(ATTEMPTS)):
        try:
            ray.init(**more, log_to_driver=False, configure_logging=False)
            return
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise UserError(f"no Ray cluster at {more['address']}: {str(error).splitlines()[0]}") from None
        except Exception as error:  # what Ray raises when a node does not start in time
            ray.shutdown()
            if not left:
                raise UserError(f"Ray does not start here: {str(error).splitlines()[0]}") from None
