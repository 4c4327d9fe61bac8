"""Which rows of a prefill batch belong to the tails of their prompts, and the batch as SGLang would have it of these.

Written against ForwardBatch of SGLang 0.5.23 (model_executor/forward_batch_info.py).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from pdtrim_sglang.by_request import ByRequest


@dataclass(frozen=True)
class BatchPart:
    """Rows of a batch, int64 on its device, and a batch of them alone."""

    rows: Tensor
    batch: Any


@dataclass(frozen=True)
class Division:
    """What a batch has of tokens that some layers run for K and V alone, and of tails, which run them whole.

    A batch of bodies alone has no parts.
    """

    parts: tuple[BatchPart, BatchPart] | None = None


def tail_lengths(
    rids: Sequence[str],
    prefixes: Sequence[int],
    extends: Sequence[int],
    prompts: Mapping[str, int] | ByRequest[int],
    tail: int,
) -> list[int]:
    """By request, how many of the tokens that the batch computes are among the last `tail` of its prompt.

    Requests that `prompts` does not know have no tail: SGLang's warm-up, and those that were aborted.
    """
    lengths = []
    for rid, prefix, extend in zip(rids, prefixes, extends, strict=True):
        prompt = prompts.get(rid)
        begin = prefix + extend if prompt is None else prompt - tail
        lengths.append(min(extend, max(0, prefix + extend - begin)))
    return lengths


def part_of(batch: Any, firsts: Sequence[int], lengths: Sequence[int]) -> BatchPart:
    """Of each request of an extend batch `lengths` rows from its `firsts` on; those without rows are left out."""
    places = [place for place, length in enumerate(lengths) if length]
    counts, ends = [lengths[place] for place in places], list(accumulate(batch.extend_seq_lens_cpu))
    begins = [ends[place] - batch.extend_seq_lens_cpu[place] + firsts[place] for place in places]
    device, size = batch.seq_lens.device, batch.extend_seq_lens.dtype
    spans = [torch.arange(begin, begin + count) for begin, count in zip(begins, counts, strict=True)]
    rows, requests = _on(torch.cat(spans), device), _on(torch.tensor(places), device)
    later = torch.tensor([ends[place] - begin for place, begin in zip(places, begins, strict=True)])
    later -= torch.tensor(counts)  # tokens of the request in the batch that come after its rows
    view = copy.copy(batch)
    view.batch_size, view.extend_num_tokens = len(places), sum(counts)
    view.req_pool_indices = batch.req_pool_indices[requests]
    view.req_pool_indices_cpu = _picked(getattr(batch, "req_pool_indices_cpu", None), torch.tensor(places))
    for name in ("seq_lens", "orig_seq_lens", "seq_lens_cpu"):
        at = torch.tensor(places) if name == "seq_lens_cpu" else requests
        setattr(view, name, _less(_picked(getattr(batch, name, None), at), later))
    for name in ("input_ids", "positions", "out_cache_loc"):
        setattr(view, name, getattr(batch, name)[rows])
    view.rids = [batch.rids[place] for place in places]
    view.extend_seq_lens_cpu = counts
    view.extend_prefix_lens_cpu = [batch.extend_prefix_lens_cpu[place] + firsts[place] for place in places]
    lens = torch.tensor([counts, view.extend_prefix_lens_cpu], dtype=size)
    view.extend_seq_lens, view.extend_prefix_lens = _on(lens, device)
    view.extend_start_loc = view.extend_seq_lens.cumsum(0).to(size) - view.extend_seq_lens
    view.seq_lens_sum = sum(counts) + sum(view.extend_prefix_lens_cpu)
    view.global_num_token_non_padded_cpu = view.extend_num_tokens
    view.residual_stream = view.num_token_non_padded = view.global_num_token_non_padded = None
    return BatchPart(rows, view)


def _picked(values: Tensor | None, places: Tensor) -> Tensor | None:
    return None if values is None else values[places]


def _less(values: Tensor | None, tokens: Tensor) -> Tensor | None:
    if values is None or not tokens.any():
        return values
    return values - _on(tokens.to(values.dtype), values.device)


def _on(values: Tensor, device: torch.device) -> Tensor:
    """On a GPU without a wait: from pinned memory, which torch keeps until the copy has ended."""
    return values if device.type == "cpu" else values.pin_memory().to(device, non_blocking=True)
