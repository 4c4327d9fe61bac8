"""What the steps of one build share; the model is loaded once, and only when a step needs it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pdtrim_deploy.bundle import PLAN
from pdtrim_deploy.local.allocator import give_back
from pdtrim_deploy.local.atomic import write_atomic
from pdtrim_deploy.local.cache import Cache
from pdtrim_deploy.local.compute import ON_CPU, Compute
from pdtrim_deploy.local.paths import expanded
from pdtrim_deploy.models.checkpoint import Checkpoint
from pdtrim_deploy.plan import ModelShape, PDPlan
from pdtrim_deploy.recipe import Recipe

if TYPE_CHECKING:
    from pdtrim_deploy.evaluation.corpora import Document
    from pdtrim_deploy.pruning.ray_evaluator import Workers

Note = Callable[[str], None]


@dataclass
class Context:
    """One build: `out` is the bundle's folder, `note` hears what is going on.

    `workers` evaluate the candidates of the pruning search; None: this process does. `compute` has the dtype that the
    recipe measures, fits and trains in.
    """

    recipe: Recipe
    checkpoint: Checkpoint
    cache: Cache
    out: Path
    note: Note
    workers: Workers | None = None
    compute: Compute = ON_CPU
    _texts: dict[tuple[int, int, int], tuple[Any, int]] = field(default_factory=dict, init=False, repr=False)

    @property
    def shape(self) -> ModelShape:
        """As the recipe serves it: what it computes in, and its KV pools."""
        return self.checkpoint.shape(self.recipe.model.dtype).with_pool(self.recipe.kv.pool_dtype)

    @property
    def measured_model(self) -> str:
        """Names what measurements are of: the model's fingerprint and, unless it is float32, what it computes in."""
        dtype = self.compute.dtype
        return self.checkpoint.fingerprint + ("" if dtype == "float32" else f" in {dtype}")

    @property
    def plan(self) -> PDPlan:
        """As the KV step wrote it."""
        return PDPlan.load(self.out / PLAN)

    @cached_property
    def model(self) -> Any:
        """The dense model, in float32 by default: blocks are removed on differences that bfloat16 may blur."""
        from pdtrim_deploy.models.on_devices import load_on

        self.note("loading the model")
        return load_on(self.checkpoint, self.compute.with_blocks(None), self.note)

    def forget_model(self) -> None:
        """Give its memory back, where it was loaded; whoever asks for it again loads it again."""
        if vars(self).pop("model", None) is not None:
            self.give_back()  # a model's modules refer to one another

    def give_back(self) -> None:
        """Give back the memory that earlier steps have freed."""
        give_back(self._weights)

    @cached_property
    def _weights(self) -> int:
        """Bytes of the source's weights, as they lie on disk."""
        return sum(file.stat().st_size for file in self.checkpoint.path.glob("*.safetensors"))

    @property
    def blocks_in_memory(self) -> int | None:
        """The fewer of those that the recipe and the command allow; None: all."""
        allowed = (self.recipe.pruning.blocks_in_memory, self.compute.blocks_in_memory)
        return min((blocks for blocks in allowed if blocks is not None), default=None)

    @property
    def bounded(self) -> bool:
        """Whether fewer blocks are in memory at a time than there are."""
        return self.compute.with_blocks(self.blocks_in_memory).streams(self.shape.num_blocks)

    @property
    def streamed_model(self) -> Any:
        """The same or, where blocks in memory are bounded, one whose weights come from the checkpoint."""
        if not self.bounded:
            return self.model
        from pdtrim_deploy.models.on_devices import load_on

        return load_on(self.checkpoint, self.compute.with_blocks(self.blocks_in_memory), self.note)

    def calibration(self, sequences: int, length: int, prompt_tokens: int | None = None) -> Any:
        """int64 `[sequences, length]` of the calibration split.

        Where the recipe wants the model's own words, they follow the first `prompt_tokens`, by default half of them.
        """
        from pdtrim_deploy.models.loading import load_tokenizer
        from pdtrim_deploy.pipeline.on_policy import Speaker, end_ids, with_continuations

        drawn, missing = self.drawn(sequences, length, prompt_tokens)
        if not missing:
            return drawn
        ends = end_ids(self.checkpoint.path, load_tokenizer(self.checkpoint.path))
        speaker = Speaker(self.measured_model, lambda: self.model, ends, self.cache, self.out, self.note)
        return with_continuations(speaker, self.recipe.calibration, drawn, missing)

    def drawn(self, sequences: int, length: int, prompt_tokens: int | None = None) -> tuple[Any, int]:
        """What `calibration` takes from the corpora, and how many tokens the model adds to each sequence.

        Drawn once: several steps read the same text, and splitting it into tokens takes seconds.

        Raises:
            UserError: the corpora have not so many sequences of that length.

        """
        key = (sequences, length, length // 2 if prompt_tokens is None else prompt_tokens)
        if key not in self._texts:
            self._texts[key] = self._draw(*key)
        ids, missing = self._texts[key]
        return ids.clone(), missing

    def _draw(self, sequences: int, length: int, prompt: int) -> tuple[Any, int]:
        from pdtrim_deploy.evaluation import corpora
        from pdtrim_deploy.models.loading import load_tokenizer

        section, tokenizer = self.recipe.calibration, load_tokenizer(self.checkpoint.path)
        parts = [
            (self._documents(corpora.load(part.corpus, self.cache, self.note).split("calibration")), part.share)
            for part in section.shares
        ]
        if section.continuations == "text" or prompt >= length:
            return corpora.mixed(parts, tokenizer, sequences, length, section.seed), 0
        prompts = corpora.mixed(parts, tokenizer, sequences, prompt, section.seed, draw=corpora.prompts)
        return prompts, length - prompt

    def _documents(self, documents: tuple[Document, ...]) -> tuple[Document, ...]:
        """The same, of the lengths that the recipe draws them from."""
        from pdtrim_deploy.pipeline.lengths import with_lengths

        section = self.recipe.calibration
        if section.lengths is None:
            return documents
        return with_lengths(documents, expanded(section.lengths), section.seed)


def write_json(path: Path, data: Any) -> None:
    """A report: whole or not at all."""
    write_atomic(path, json.dumps(data, indent=2) + "\n")
