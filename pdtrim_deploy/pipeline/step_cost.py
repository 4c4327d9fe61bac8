"""What one step of a build takes: memory, files, operations and reads."""

from __future__ import annotations

from dataclasses import dataclass

from pdtrim_deploy.models.footprint import Peak
from pdtrim_deploy.pipeline.training_costs import TrainingCost

WRITTEN = 0.45e9  # bytes a second of a stage that is cast and written, as in benchmarks/results/build.json


@dataclass(frozen=True)
class StepCost:
    """Of one step.

    Attributes:
        peak: bytes of memory at a time.
        disk: bytes of files that it leaves or has while it runs.
        flops: operations, likely, besides those of `trainings`; None where nobody knows.
        trainings: by gradients, each for `minutes` at most.
        written: bytes of a stage that are read, cast and written.
        hashed: bytes of files that the seal reads again.
        reads: bytes read from the checkpoint, where blocks are read as they run, at most.

    """

    peak: Peak
    disk: float = 0.0
    flops: float | None = None
    reads: float = 0.0
    trainings: tuple[TrainingCost, ...] = ()
    minutes: float | None = None
    written: float = 0.0
    hashed: float = 0.0

    @property
    def operations(self) -> float | None:
        """All of them, if there is no limit of time."""
        return None if self.flops is None else self.flops + sum(training.flops for training in self.trainings)

    def seconds(self, speed: float | None, hash_rate: float) -> float | None:
        """At `speed` operations a second, and so many bytes hashed a second; None where nobody knows."""
        files = self.written / WRITTEN + self.hashed / hash_rate
        if self.flops is None:
            return files or None
        if speed is None:
            return None if self.operations else files
        return files + self.flops / speed + sum(training.seconds(speed, self.minutes) for training in self.trainings)
