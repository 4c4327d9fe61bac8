"""Which decode workers a prefill worker serves, and how SGLang remembers a request's destination."""

from __future__ import annotations

from dataclasses import dataclass

from pdtrim_deploy.plan import PDPlan
from pdtrim_deploy.plan.heads import indivisible, sent_heads, source_ranks, unpairable
from pdtrim_sglang.messages import Register
from pdtrim_sglang.protocol import VERSION
from pdtrim_sglang.rooms import AuxRows


@dataclass(frozen=True)
class RoomInfo:
    """A request's destination at one rank of decode, in the form that CommonKVManager keeps in `transfer_infos`.

    `heads` are the KV heads that this rank of prefill sends there, none where another one sends its copies of them;
    `carries_aux`: and the aux row with them.
    """

    session: str
    endpoint: str
    dst_port: int
    prompt_tokens: int
    prefix_tokens: int
    required_dst_info_num: int
    heads: range = range(0)
    carries_aux: bool = False
    is_dummy: bool = False


@dataclass(frozen=True)
class Ranks:
    """A rank of prefill among those that attention is divided among, and the KV heads of the model."""

    size: int
    rank: int
    kv_heads: int

    def share(self, decode: Register) -> tuple[range, bool]:
        """What this rank sends to a rank of decode: KV heads, and whether the aux row with them."""
        shares = sent_heads(self.kv_heads, self.size, decode.tp_size, decode.tp_rank)
        return shares.get(self.rank, range(0)), self.rank == next(iter(shares))

    def destinations(self, decode: Register) -> int:
        """How many ranks of decode speak to this one."""
        return max(1, decode.tp_size // self.size)


def unlike_ranks(prefill_tp: int, decode_tp: int) -> str:
    """Why ranks of these attention TP sizes cannot be paired, in one sentence; empty when they can."""
    reason = unpairable(prefill_tp, decode_tp)
    return reason and (
        f"{reason}: choose --tp-size (with --enable-dp-attention divided by --dp-size) of one worker as a multiple of "
        "the other's"
    )


def rejection(message: Register, plan: PDPlan, ranks: Ranks, aux: AuxRows) -> str:
    """Why the decode worker that sent `message` cannot be served from here, in one sentence; empty when it can."""
    if message.protocol != VERSION:
        return f"decode speaks transfer protocol {message.protocol}, prefill {VERSION}: install one pdtrim-deploy"
    if message.digest != plan.digest:
        return (
            f"plans differ: prefill serves plan {plan.digest}, decode serves plan {message.digest}; "
            "start both workers from one bundle"
        )
    if unlike := unlike_ranks(ranks.size, message.tp_size) or indivisible(ranks.kv_heads, message.tp_size):
        return unlike
    size, rank = message.tp_size, message.tp_rank
    if rank >= size or ranks.rank not in source_ranks(ranks.size, size, rank):
        return f"rank {rank} of {size} of decode has no KV to take from rank {ranks.rank} of {ranks.size} of prefill"
    if message.aux_item_bytes != aux.item_bytes:
        return "metadata rows differ: start both workers with the same SGLang version and options"
    return ""
