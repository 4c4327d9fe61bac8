"""Students by pair, each made once."""

from __future__ import annotations

import errno
import hashlib
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.local.cache import Cache
from pdtrim_deploy.models.blockwise import CausalLM
from pdtrim_deploy.models.streaming import own_weights
from pdtrim_deploy.models.surgery import keep_blocks
from pdtrim_deploy.models.writer import save
from pdtrim_deploy.pruning.students.regression import TrainedStudent, teach
from pdtrim_deploy.pruning.students.states import HiddenFiles
from pdtrim_deploy.recipe.healing import StudentsSection

Pair = tuple[int, int]
WEIGHTS, LESSON = "student.safetensors", "lesson.json"


class Students:
    """Makes and keeps the student of every pair that is asked for.

    Args:
        model: the dense model, float32, whole or streamed. It is run once over `ids`, when the first student is made.
        ids: calibration text, int64 `[S, T]`.
        cache: where students are kept beyond this process, and mapped from; None keeps them in memory alone.
        fingerprint: names the model in the cache.
        work: folder for hidden states while this object lives; by default the system's temporary one.

    Raises:
        UserError: a loss that is not a number; no room for hidden states.

    """

    def __init__(
        self,
        model: CausalLM,
        ids: Tensor,
        section: StudentsSection,
        *,
        cache: Cache | None = None,
        fingerprint: str = "",
        work: Path | None = None,
        note: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.model, self.ids, self.section, self.cache, self.note = model, ids, section, cache, note
        self._students: dict[Pair, tuple[nn.Module, dict[str, Any]]] = {}
        self._work, self._states = work, None
        key = [fingerprint, section.model_dump(mode="json"), list(ids.shape), ids.numpy().tobytes().hex(), _VERSION]
        self._digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()

    _states: HiddenFiles | None
    _folder: tempfile.TemporaryDirectory[str]  # goes with this object

    def layer(self, pair: Pair) -> nn.Module:
        """The student, to be run in place of block `pair[0]`; block `pair[1]` is then left out."""
        return self._student(pair)[0]

    def tensors(self, pair: Pair) -> dict[str, Tensor]:
        """All its tensors by their name within the block."""
        return dict(self.layer(pair).state_dict())

    def lesson(self, pair: Pair) -> dict[str, Any]:
        """How it was made: `start`, `error_drop`, `error_fit`, `error`, `steps` (see `TrainedStudent`)."""
        return self._student(pair)[1]

    def _student(self, pair: Pair) -> tuple[nn.Module, dict[str, Any]]:
        if pair not in self._students:
            if pair[1] != pair[0] + 1 or not 0 <= pair[0] < len(self.model.model.layers) - 1:
                raise UserError(f"blocks {pair} are no adjacent pair of this model")
            self._students[pair] = self._kept(pair, self.cache) if self.cache else self._fresh(pair)
        return self._students[pair]

    def _fresh(self, pair: Pair) -> tuple[nn.Module, dict[str, Any]]:
        layer, lesson = _parts(self._teach(pair))
        return layer.to(self.model.dtype), lesson

    def _kept(self, pair: Pair, cache: Cache) -> tuple[nn.Module, dict[str, Any]]:
        def make(folder: Path) -> None:
            layer, lesson = _parts(self._teach(pair))
            save(layer.state_dict(), folder / WEIGHTS)
            (folder / LESSON).write_text(json.dumps(lesson))

        folder = cache.entry("students", f"{self._digest}-{pair[0]}", make)
        cut = keep_blocks(self.model, [pair[0]], {pair[0]: load_file(folder / WEIGHTS)})
        return own_weights(cut.model.layers[0]), json.loads((folder / LESSON).read_text())

    def _teach(self, pair: Pair) -> TrainedStudent:
        if self._states is None:
            try:
                self._folder = tempfile.TemporaryDirectory(prefix="hidden-", dir=self._work)
                self._states = HiddenFiles.record(self.model, self.ids, Path(self._folder.name), note=self.note)
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
                raise UserError("no room on the disk for hidden states of calibration text; free some space") from error
        self.note(f"student of blocks {pair[0]} and {pair[1]}")
        with torch.random.fork_rng():
            return teach(self.model, pair[0], self._states[pair[0]], self._states[pair[1] + 1], self.section, self.note)


_VERSION = 1  # of how students are made


def _parts(lesson: TrainedStudent) -> tuple[nn.Module, dict[str, Any]]:
    facts = {name: value for name, value in vars(lesson).items() if name != "layer"}
    return lesson.layer, facts
