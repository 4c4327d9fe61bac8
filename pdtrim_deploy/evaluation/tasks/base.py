"""What a task is: prompts with continuations, judged behind many plans at the cost of one prefill.

Every task is teacher-forced: a prompt is prefilled once, each plan hands its KV over once, and decode reads all its
continuations in one pass. What a task makes of that, one number per item and measure, is its `read`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.evaluation.corpora.base import Document, Log
from pdtrim_deploy.evaluation.measured import Measured
from pdtrim_deploy.evaluation.tasks.judge import Judgement, judge_parts
from pdtrim_deploy.local.cache import Cache
from pdtrim_deploy.models.oracle import PDOracle

KV_TOKENS = 8192  # prompt tokens whose KV is in memory at a time, a prompt at least

Values: TypeAlias = dict[str, Tensor]
"""Float64 `[batch]` for each measure."""


@dataclass(frozen=True)
class Part:
    """Items with prompts of one length.

    Attributes:
        prompts: int64 `[items, N]`.
        continuations: int64 `[items, C, T]`, T >= 2, padded on the right with any valid token.
        lengths: int64 `[items, C]`, 1 <= length <= T.
        groups: what each item is counted under (its prompt length, its depth), `[items]`.

    """

    prompts: Tensor
    continuations: Tensor
    lengths: Tensor
    groups: tuple[str, ...]

    @classmethod
    def of(cls, prompts: Tensor, continuations: Sequence[Sequence[Sequence[int]]], groups: Sequence[str]) -> Part:
        """From ragged continuations, `[items][C][tokens]`."""
        lengths = torch.tensor([[len(tokens) for tokens in item] for item in continuations])
        padded = torch.zeros((*lengths.shape, max(2, int(lengths.max()))), dtype=torch.int64)
        for row, item in zip(padded, continuations, strict=True):
            for place, tokens in zip(row, item, strict=True):
                place[: len(tokens)] = torch.tensor(tokens)
        return cls(prompts, padded, lengths, tuple(groups))

    @property
    def positions(self) -> int:
        """Positions that prompt and continuation take."""
        return self.prompts.shape[1] + self.continuations.shape[2]

    @property
    def batch(self) -> int:
        """Items of one prefill."""
        return max(1, KV_TOKENS // self.prompts.shape[1])


@dataclass(frozen=True)
class Task:
    """Prepared items, and how a judgement of some becomes values.

    `read(continuations, lengths, judgement)` gets one batch of a part: int64 `[batch, C, T]`, `[batch, C]`.
    `repeated`: every part judges the first one's texts again, in the same order. `documents` numbers what the items of
    each part were taken from, as `Windows` does; left out, every text is its own.
    """

    name: str
    parts: tuple[Part, ...]
    read: Callable[[Tensor, Tensor, Judgement], Values]
    repeated: bool = False
    documents: tuple[int, ...] = ()

    def measure(self, oracles: Sequence[PDOracle], note: Log = lambda _: None, *, kv_bytes: int = 0) -> list[Measured]:
        """Judge plans that share their prefill: one prefill per batch of prompts, then each oracle's decode.

        Args:
            oracles: made of one another by `with_kv`, or at least with one prefill model and KV dtype.
            kv_bytes: of prompt KV of batches that go side by side, so that streamed blocks are read once for all.

        Returns:
            One result per oracle.

        Raises:
            ValueError: the oracles do not share their prefill.
            UserError: a value is not a number.

        """
        first = oracles[0]
        if any(o.prefill_model is not first.prefill_model or o.plan.model != first.plan.model for o in oracles):
            raise ValueError("these oracles do not share their prefill; measure each family by itself")
        by_oracle: list[list[Values]] = [[] for _ in oracles]
        done, total = 0, sum(len(part.groups) for part in self.parts)
        for part in self.parts:
            at_once = part.batch * first.parts_at_once(part.batch, part.prompts.shape[1], kv_bytes)
            tensors = (part.prompts, part.continuations, part.lengths)
            for group in zip(*(tensor.split(at_once) for tensor in tensors), strict=True):
                prompts, padded, lengths = (tensor.split(part.batch) for tensor in group)
                continuations = [
                    ids[..., : max(2, int(counts.max()))] for ids, counts in zip(padded, lengths, strict=True)
                ]
                states = first.prefill_parts(prompts)
                for oracle, values in zip(oracles, by_oracle, strict=True):
                    judgements = judge_parts(oracle, states, continuations, lengths)
                    values.extend(map(self.read, continuations, lengths, judgements))
                done += len(group[0])
                note(f"{self.name}: {done}/{total} items, {len(oracles)} plans")
        groups = tuple(group for part in self.parts for group in part.groups)
        return [Measured(self.name, groups, self._joined(values), self._subjects) for values in by_oracle]

    @property
    def _subjects(self) -> tuple[int, ...]:
        if self.documents:
            return self.documents * len(self.parts)
        return tuple(n for part in self.parts for n in range(len(part.groups))) if self.repeated else ()

    def _joined(self, batches: list[Values]) -> dict[str, tuple[float, ...]]:
        joined = {measure: torch.cat([values[measure] for values in batches]) for measure in batches[0]}
        for measure, values in joined.items():
            if not bool(values.isfinite().all()):
                raise UserError(
                    f"task {self.name}: {measure} is not a number; load the model in float32 or check its weights"
                )
        return {measure: tuple(values.tolist()) for measure, values in joined.items()}


@dataclass(frozen=True)
class Setting:
    """What tasks are prepared from.

    Attributes:
        dense: the unpruned model behind its dense plan; only `agreement` runs it while preparing.
        documents: held-out text, a corpus's final split.
        cache: where data sets are kept.
        size: items wanted, in the task's own unit; None: its default.

    """

    tokenizer: Any
    dense: PDOracle
    documents: Sequence[Document]
    cache: Cache
    seed: int = 0
    size: int | None = None
    note: Log = lambda _: None
