"""Candidates evaluated by Ray: several processes of this machine, or workers of a cluster, each with its own model.

A worker reads the checkpoint from its folder (safetensors) and makes the objective as this process would; what travels
is solutions out and losses back. Answers depend on (solution, batch) alone, so any number of workers gives the same.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.pruning.evaluator import InProcess
from pdtrim_deploy.pruning.objective import NextTokenLoss, StudentLayers
from pdtrim_deploy.pruning.solution import Solution

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


class _Students:
    def __init__(self, device: str) -> None:
        self._made: Layers = {}
        self._device = device

    def add(self, more: Layers) -> None:
        self._made |= {pair: made.to(self._device) for pair, made in more.items()}

    def layer(self, pair: tuple[int, int]) -> nn.Module:
        return self._made[pair]


class Worker:
    """One process: an `InProcess` over its own copy of the model, in float32 as the search's own."""

    def __init__(self, checkpoint: Path, threads: int, device: str) -> None:
        torch.set_num_threads(threads)
        self._device, self._checkpoint = device, checkpoint

    @cached_property
    def _model(self) -> Any:
        from pdtrim_deploy.models.loading import load_model

        return load_model(self._checkpoint, "float32").to(self._device)

    def prepare(self, work: Work) -> int:
        """For another search; block-forwards so far."""
        self._students = _Students(self._device)
        self._students.add(work.students)
        ids = work.ids.to(self._device)
        objective = NextTokenLoss(self._model, ids, work.prompt_tokens, work.forced, self._students)
        self._inside = InProcess(objective, work.memory)
        return self._inside.block_forwards

    def evaluate(self, solutions: list[Solution], batch: int, more: Layers) -> tuple[list[Any], int]:
        """(float32 arrays, block-forwards so far); `more` are students yet unknown."""
        self._students.add(more)
        return [one.cpu().numpy() for one in self._inside.evaluate(solutions, batch)], self._inside.block_forwards

    def settle(self, solution: Solution) -> int:
        """As `Evaluator.settle`; block-forwards so far."""
        self._inside.settle(solution)
        return self._inside.block_forwards


class OnRay:
    """An `Evaluator` whose workers take a round's solutions in turns; each solution has one worker for good.

    So what a worker knows of a solution (its losses on other batches, hidden states) is never asked of another.
    """

    def __init__(
        self, actors: list[Any], work: Work, blocks: int, batches: int, students: StudentLayers | None
    ) -> None:
        import ray

        self.workers, self.blocks, self.batches = len(actors), blocks, batches
        self._actors, self._students = actors, students
        shared = ray.put(work)
        self._cost = _answers([actor.prepare.remote(shared) for actor in actors])
        self._known = [set(work.students) for _ in actors]
        self._place: dict[Solution, int] = {}

    @property
    def block_forwards(self) -> int:
        """Blocks run, times sequences, so far, over all workers."""
        return sum(self._cost)

    def evaluate(self, solutions: Sequence[Solution], batch: int) -> list[Tensor]:
        """Losses on one batch, in the order asked; UserError when one is not a number."""
        shares: list[list[int]] = [[] for _ in self._actors]
        for index, solution in enumerate(solutions):
            shares[self._place.setdefault(solution, len(self._place) % self.workers)].append(index)
        asked = {
            number: actor.evaluate.remote(
                part := [solutions[i] for i in shares[number]], batch, self._new(number, part)
            )
            for number, actor in enumerate(self._actors)
            if shares[number]
        }
        found: dict[int, Tensor] = {}
        for number, (losses, self._cost[number]) in zip(asked, _answers([*asked.values()]), strict=True):
            found |= {i: torch.from_numpy(one.copy()) for i, one in zip(shares[number], losses, strict=True)}
        return [found[index] for index in range(len(solutions))]

    def _new(self, number: int, solutions: list[Solution]) -> Layers:
        """Students that a worker has not seen."""
        new = {pair for one in solutions for pair in one.pairs} - self._known[number]
        self._known[number] |= new
        return _made(self._students, new)

    def settle(self, solution: Solution) -> None:
        """Tell all workers."""
        self._cost = _answers([actor.settle.remote(solution) for actor in self._actors])


def _answers(asked: list[Any]) -> list[Any]:
    """What workers say; UserError when one says so or died."""
    import ray
    from ray.exceptions import RayError, RayTaskError

    try:
        return ray.get(asked)
    except RayTaskError as error:
        if isinstance(error.cause, UserError):
            raise UserError(str(error.cause)) from None
        raise
    except RayError as error:
        raise UserError(
            f"a Ray worker died, perhaps for want of memory ({type(error).__name__}); take fewer --workers and run the "
            "same command again: the search goes on where it was"
        ) from error


def _made(students: StudentLayers | None, pairs: Iterable[tuple[int, int]]) -> Layers:
    return {pair: students.layer(pair) for pair in pairs} if students is not None else {}


class EvaluatorFactory:
    """What `choose_stages` takes: the evaluator of each of its searches, by the same workers of the standing cluster.

    `checkpoint` is read where a worker runs, from the same path.

    Raises:
        UserError: the cluster has not so many CPUs or GPUs.

    """

    def __init__(self, asked: Workers, checkpoint: Path) -> None:
        import ray

        has = ray.cluster_resources()
        for what, each in (("CPU", 1), ("GPU", asked.gpus)):
            if asked.count * each > has.get(what, 0):
                raise UserError(
                    f"{asked.count} workers with {each:g} {what} each are asked for, but the Ray cluster has "
                    f"{has.get(what, 0):g}; lower --workers or --worker-gpus"
                )
        threads = max(1, torch.get_num_threads() // asked.count) if asked.address is None else 1
        remote: Any = ray.remote(num_cpus=1, num_gpus=asked.gpus)(Worker)
        device = "cuda" if asked.gpus else "cpu"
        self._actors = [remote.remote(checkpoint, threads, device) for _ in range(asked.count)]

    def __call__(
        self,
        objective: NextTokenLoss,
        ids: Tensor,
        prompt_tokens: int,
        forced: Solution,
        students: StudentLayers | None,
        memory: int,
    ) -> OnRay:
        """One search's."""
        work = Work(ids, prompt_tokens, forced, _made(students, forced.pairs), memory)
        return OnRay(self._actors, work, objective.blocks, objective.batches, students)


@contextmanager
def cluster(asked: Workers) -> Iterator[None]:
    """Ray for the time of a search: one of our own on 127.0.0.1 that ends with it, or the one at `asked.address`.

    Raises:
        UserError: nothing answers at the address, or Ray does not start.

    """
    if asked.address is None:
        if "ray" in sys.modules and any(os.environ.get(name) != value for name, value in LOCAL.items()):
            raise RuntimeError("ray was imported before: its servers would listen on all interfaces")
        os.environ.update(LOCAL)
    import ray

    more: dict[str, Any] = {"address": asked.address}
    if asked.address is None:
        more = {"address": "local", "num_cpus": asked.count, "include_dashboard": False}
        more |= {"object_store_memory": OBJECT_STORE, "_node_ip_address": "127.0.0.1"}
    _start(ray, more)
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
