"""Calibration text as decode will read it: prompts, and behind each what the dense model itself says."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pdtrim_deploy.bundle import WORK
from pdtrim_deploy.local.cache import Cache
from pdtrim_deploy.local.row_log import RowLog
from pdtrim_deploy.models.blockwise import CausalLM
from pdtrim_deploy.models.continuation import continued
from pdtrim_deploy.recipe import CalibrationSection
from pdtrim_deploy.recipe.seed import seed_of_part

if TYPE_CHECKING:
    from torch import Tensor

_VERSION = 1  # of how continuations are made


@dataclass(frozen=True)
class Speaker:
    """The dense model of a build, and where what it says is kept.

    Attributes:
        name: what continuations are kept by: the model, and the dtype that it speaks in.
        model: gives the model; asked only where something is not in the cache.
        end_ids: tokens that end what it says.
        out: the bundle's folder, where a build that is stopped leaves what it has.

    """

    name: str
    model: Callable[[], CausalLM]
    end_ids: Sequence[int]
    cache: Cache
    out: Path
    note: Callable[[str], None]


def with_continuations(speaker: Speaker, section: CalibrationSection, prompts: Tensor, tokens: int) -> Tensor:
    """`prompts`, int64 `[S, P]`, each with `tokens` tokens of the dense model behind it: int64 `[S, P + tokens]`.

    Kept in the cache by model, prompts and settings; a build that was stopped goes on behind the prompts it finished.
    What ends a text is never chosen, so that all have their length.
    """
    ends = [*speaker.end_ids]
    about = [_VERSION, speaker.name, section.continuations, section.seed, tokens, ends]
    text = hashlib.sha256(f"{tuple(prompts.shape)}".encode() + prompts.numpy().tobytes()).hexdigest()
    key = hashlib.sha256(json.dumps([*about, text]).encode()).hexdigest()

    def make(entry: Path) -> None:
        log = RowLog(speaker.out / WORK / f"continuations-{key[:16]}.jsonl", key)
        for start in range(0, len(prompts), section.AT_ONCE):
            if log.find(start=start) is None:
                speaker.note(f"the model continues prompts {start + 1} to {start + section.AT_ONCE} of {len(prompts)}")
                part = prompts[start : start + section.AT_ONCE]
                draws = None if section.continuations == "greedy" else _draws(section.seed, start, len(part), tokens)
                log.append({"start": start, "ids": continued(speaker.model(), part, tokens, ends, draws).tolist()})
        (entry / "ids.json").write_text(json.dumps([ids for row in log.rows for ids in row["ids"]]))

    entry = speaker.cache.entry("continuations", key, make)
    continuations = torch.tensor(json.loads((entry / "ids.json").read_text()), dtype=torch.int64)
    return torch.cat((prompts, continuations), 1)


def _draws(seed: int, start: int, count: int, tokens: int) -> Tensor:
    """Of each prompt by its number, so that no batch depends on those before it."""
    rows = [
        torch.rand(tokens, dtype=torch.float64, generator=torch.Generator().manual_seed(seed_of_part(seed, number)))
        for number in range(start, start + count)
    ]
    return torch.stack(rows)


def end_ids(folder: Path, tokenizer: Any) -> list[int]:
    """Ids that end what the model says, by its tokenizer and its generation config."""
    file = folder / "generation_config.json"
    eos = json.loads(file.read_text()).get("eos_token_id") if file.exists() else None
    ids = [*(eos if isinstance(eos, list) else [eos]), tokenizer.eos_token_id]
    return sorted({number for number in ids if number is not None})
