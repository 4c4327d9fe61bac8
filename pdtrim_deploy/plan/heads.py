"""Which KV heads each tensor-parallel rank of attention holds, and which of them it sends to which rank of decode.

Ranks divide the heads evenly, in order; where there are more ranks than heads, neighbouring ranks hold copies of one
head (as SGLang's QKVParallelLinear loads it). Of two numbers of ranks one divides the other, so a rank of the stage
with more ranks has one partner, whose heads include its own. Ranges are of the model's heads.

    8 heads     prefill 2: 0-3 4-7          decode 4: 0-1 2-3 4-5 6-7         each prefill rank sends two slices
    2 heads     prefill 4: 0 0 1 1          decode 1: 0-1                     ranks 0 and 2 send, 1 and 3 hold copies
"""

from __future__ import annotations


def indivisible(kv_heads: int, ranks: int) -> str:
    """Why `ranks` ranks cannot divide `kv_heads` heads, in one clause; empty when they can."""
    if kv_heads % ranks == 0 or ranks % kv_heads == 0:
        return ""
    return f"{kv_heads} KV heads can neither be divided among {ranks} ranks nor be copied to them evenly"


def unpairable(prefill_ranks: int, decode_ranks: int) -> str:
    """Why stages of these numbers of ranks cannot be paired, in one clause; empty when they can."""
    if prefill_ranks % decode_ranks == 0 or decode_ranks % prefill_ranks == 0:
        return ""
    return (
        f"attention is divided among {prefill_ranks} ranks in prefill, among {decode_ranks} in decode, and neither "
        "is a multiple of the other"
    )


def held_heads(kv_heads: int, ranks: int, rank: int) -> range:
    """Heads that `rank` of `ranks` holds."""
    first = rank * kv_heads // ranks
    return range(first, first + max(1, kv_heads // ranks))


def source_ranks(prefill_ranks: int, decode_ranks: int, decode_rank: int) -> range:
    """Ranks of prefill that a rank of decode speaks to."""
    first = decode_rank * prefill_ranks // decode_ranks
    return range(first, first + max(1, prefill_ranks // decode_ranks))


def sent_heads(kv_heads: int, prefill_ranks: int, decode_ranks: int, decode_rank: int) -> dict[int, range]:
    """Heads that a rank of decode gets, each once, by the rank of prefill that sends them.

    A rank of prefill whose heads are all copies of an earlier one's sends nothing, and is absent.
    """
    heads, shares = held_heads(kv_heads, decode_ranks, decode_rank), dict[int, range]()
    missing = heads.start
    for rank in source_ranks(prefill_ranks, decode_ranks, decode_rank):
        held = held_heads(kv_heads, prefill_ranks, rank)
        share = range(max(held.start, missing), min(held.stop, heads.stop))
        if share:
            shares[rank], missing = share, share.stop
    return shares
