"""Prefill batches as SGLang's scheduler makes them, of prompts that are computed in chunks."""

from __future__ import annotations

from typing import NamedTuple

import torch

SLOTS = 32  # of a request


class Part(NamedTuple):
    """`extend` tokens of a request that a batch computes behind `prefix` tokens; `row` is its row in the pool."""

    rid: str
    row: int
    prefix: int
    extend: int

    @property
    def stop(self):
        return self.prefix + self.extend


def slots_of(rows):
    """SGLang's table of slots `[rows, SLOTS]`, in no order; slot 0 is nobody's."""
    generator = torch.Generator().manual_seed(rows)
    return 1 + torch.randperm(rows * SLOTS, generator=generator).view(rows, SLOTS).int()


def extend_batch(parts, table, mode=None):
    """SGLang's own ForwardBatch; a token's id tells its request's row and its position."""
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch, ForwardMode

    positions = torch.cat([torch.arange(part.prefix, part.stop) for part in parts])
    rows = torch.cat([torch.full((part.extend,), part.row) for part in parts])
    lengths = torch.tensor([part.stop for part in parts])
    prefixes, extends = [part.prefix for part in parts], [part.extend for part in parts]
    counts = torch.tensor(extends, dtype=torch.int32)
    return ForwardBatch(
        forward_mode=mode or ForwardMode.EXTEND,
        batch_size=len(parts),
        rids=[part.rid for part in parts],
        input_ids=1000 * rows + positions,
        positions=positions,
        out_cache_loc=table[rows, positions].long(),
        req_pool_indices=torch.tensor([part.row for part in parts]),
        req_pool_indices_cpu=torch.tensor([part.row for part in parts]),
        seq_lens=lengths,
        seq_lens_cpu=lengths.clone(),
        orig_seq_lens=lengths.int(),
        seq_lens_sum=int(lengths.sum()),
        extend_num_tokens=sum(extends),
        extend_seq_lens=counts,
        extend_seq_lens_cpu=extends,
        extend_prefix_lens=torch.tensor(prefixes, dtype=torch.int32),
        extend_prefix_lens_cpu=prefixes,
        extend_start_loc=(counts.cumsum(0) - counts).int(),
        global_num_token_non_padded_cpu=sum(extends),
    )
