"""What runs in each of Ray's processes: an `InProcess` evaluator over a model of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from pdtrim_deploy.local.compute import Compute
from pdtrim_deploy.models.placement import device_of
from pdtrim_deploy.pruning.dense_kl import DenseKL
from pdtrim_deploy.pruning.evaluator import InProcess
from pdtrim_deploy.pruning.objective import NextTokenLoss
from pdtrim_deploy.pruning.solution import Solution
from pdtrim_deploy.pruning.teacher import Teacher

Layers: TypeAlias = dict[tuple[int, int], nn.Module]


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
        inputs = self._model, work.ids, work.prompt_tokens, work.forced, self._students
        objective = NextTokenLoss(*inputs) if work.teacher is None else DenseKL(*inputs, teacher=work.teacher)
        self._inside = InProcess(objective, work.memory)
        return self._inside.block_forwards

    def evaluate(
        self, solutions: list[Solution], batch: int, more: Layers, screened: bool = False
    ) -> tuple[list[Any], int]:
        """(float32 arrays, block-forwards so far); `more` are students yet unknown."""
        self._students.add(more)
        evaluate = self._inside.screen if screened else self._inside.evaluate
        return [losses.numpy() for losses in evaluate(solutions, batch)], self._inside.block_forwards

    def settle(self, solution: Solution) -> int:
        """As `Evaluator.settle`; block-forwards so far."""
        self._inside.settle(solution)
        return self._inside.block_forwards
