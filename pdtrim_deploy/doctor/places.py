"""The folders that a job writes to."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from pdtrim_deploy.doctor.base import CheckContext, Finding, Job


@dataclass(frozen=True)
class Writable:
    """Whether `folder`, which `option` names, can be made or written; nothing is written to find out."""

    option: str
    folder: Callable[[CheckContext], Path]
    jobs: tuple[Job, ...]

    def look(self, context: CheckContext) -> Iterable[Finding]:
        """One line."""
        folder = self.folder(context).absolute()
        place = next(parent for parent in (folder, *folder.parents) if parent.exists())
        good = place.is_dir() and os.access(place, os.W_OK | os.X_OK)
        lack = "cannot be written to" if place.is_dir() else "is no folder"
        yield Finding(
            group="machine",
            name=self.option,
            status="ok" if good else "missing",
            detail=f"{folder} can be written" if good else f"{place} {lack}",
            mend=None if good else f"name another folder with {self.option}",
            needed_by=self.jobs,
        )
