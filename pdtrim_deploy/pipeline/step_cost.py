"""What one step of a build takes: memory, files, operations and reads."""

from __future__ import annotations

from dataclasses import dataclass

from pdtrim_deploy.models.footprint import Peak
from pdtrim_deploy.pipeline.training_costs import TrainingCost


@dataclass(frozen=True)
class StepCost:
    """Of one step.

    Attributes:
        peak: bytes of memory at a time.
        disk: bytes of files that it leaves or has while it runs.
        flops: operations, likely, besides those of `trainings`; None where nobody knows.
        trainings: by gradients, each for `minutes` at most.
        reads: bytes read from the checkpoint, where blocks are read as they run, at most.

    """

    peak: Peak
    disk: float = 0.0
    flops: float | None = None
    reads: float = 0.0
    trainings: tuple[TrainingCost, ...] = ()
    minutes: float | None = None

    @property
    def operations(self) -> float | None:
        """All of them, if there is no limit of time."""
        return None if self.flops is None else self.flops + sum(training.flops for training in self.trainings)

    def seconds(self, speed: float) -> float | None:
        """At `speed` operations a second."""
        if self.flops is None:
            return None
        return self.flops / speed + sum(training.seconds(speed, self.minutes) for training in self.trainings)
