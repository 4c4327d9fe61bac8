"""Where training stands, in one file: what is killed at any moment goes on from there to the same weights."""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.models.writer import save

_EVERY_S, _SHARE = 60.0, 50  # at least so many seconds, and so many times what saving takes, from save to save


@dataclass
class Position:
    """Where training stands.

    Attributes:
        run: of the runs, each with its learning rate; `phase` and `step` within it.
        seconds: of training so far, whether it was interrupted or not.
        run_began, phase_began: `seconds` when these began.
        offset: steps of the run's earlier phases.
        sweep: divergence that each short run came to, on the sequences that choose among them.
        phases: what those of the last run did.

    """

    run: int = 0
    phase: int = 0
    step: int = 0
    seconds: float = 0.0
    run_began: float = 0.0
    phase_began: float = 0.0
    offset: int = 0
    sweep: list[float] = field(default_factory=list)
    phases: list[dict[str, Any]] = field(default_factory=list)


class StateFile:
    """A `Position` and the tensors that belong to it.

    Args:
        path: None keeps nothing.
        about: digest of everything that training depends on; a file about anything else does not count.
        every_s: seconds from save to save; by default a minute, or more where saving takes long.

    """

    def __init__(self, path: Path | None = None, about: str = "", every_s: float | None = None) -> None:
        self.path, self._about, self._every_s = path, about, every_s
        self._saved, self._took = time.monotonic(), 0.0

    def load(self) -> tuple[Position, dict[str, Tensor]] | None:
        """What was saved; None if nothing was that is about the same."""
        if self.path is None or not self.path.is_file():
            return None
        try:
            with safe_open(self.path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no dictionary)
            facts = json.loads(bytes(tensors.pop("position").tolist()))
        except (OSError, SafetensorError, KeyError, ValueError):
            return None
        return (Position(**facts["position"]), tensors) if facts["about"] == self._about else None

    @property
    def due(self) -> bool:
        """Whether it is time to save."""
        every = max(_EVERY_S, _SHARE * self._took) if self._every_s is None else self._every_s
        return self.path is not None and time.monotonic() - self._saved >= every

    def save(self, position: Position, tensors: dict[str, Tensor]) -> None:
        """Replace what was saved, on the disk when this returns: readers see the old or the new, never half of it.

        Raises:
            UserError: the disk is full; what was saved before is still there.

        """
        if self.path is None:
            return
        began = time.monotonic()
        facts = json.dumps({"about": self._about, "position": asdict(position)}).encode()
        temporary = self.path.with_name(f".{self.path.name}.new-{os.getpid()}")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            save({**tensors, "position": torch.tensor(list(facts), dtype=torch.uint8)}, temporary)
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            temporary.replace(self.path)
        except OSError as error:
            raise UserError(
                f"cannot write {self.path} ({error.strerror}); free some space and run the same command again"
            ) from error
        finally:
            temporary.unlink(missing_ok=True)
        self._saved = time.monotonic()
        self._took = self._saved - began
