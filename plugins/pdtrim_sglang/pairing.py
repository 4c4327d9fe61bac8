"""Which decode workers a prefill worker serves, and how SGLang remembers a request's destination."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from pdtrim_deploy.plan import PDPlan
from pdtrim_deploy.plan.heads import indivisible, sent_heads, source_ranks, unpairable
from pdtrim_sglang.draft import DraftRows, wire_digest
from pdtrim_sglang.messages import Register, Room
from pdtrim_sglang.protocol import VERSION
from pdtrim_sglang.rooms import AuxRows

_ATTENTION_RANKS = "--tp-size (with DP attention divided by --attn-dp-size)"


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

    @classmethod
    def of(cls, message: Room, ranks: Ranks, decode: Register | None) -> RoomInfo:
        """What a rank of decode announces; it gets nothing unless it has registered as `decode`."""
        share = ranks.share(decode) if decode is not None else (range(0), False)
        return cls(
            message.session, message.host, message.control_port,
            message.prompt_tokens, message.prefix_tokens, message.destinations, *share,
        )  # fmt: skip


def unlike_ranks(prefill_tp: int, decode_tp: int) -> str:
    """Why ranks of these attention TP sizes cannot be paired, in one sentence; empty when they can."""
    reason = unpairable(prefill_tp, decode_tp)
    return reason and f"{reason}: choose {_ATTENTION_RANKS} of one worker as a multiple of the other's"


def unlike_draft_ranks(prefill_tp: int, decode_tp: int) -> str:
    """Why ranks that send a draft model's KV cannot be paired, in one sentence; empty when they can."""
    if prefill_tp == decode_tp:
        return ""
    return (
        f"prefill has {prefill_tp} attention ranks and decode {decode_tp}, and a draft model's KV is sent between "
        f"equal numbers alone: start both workers with one {_ATTENTION_RANKS}, or without --speculative-algorithm"
    )


def unlike_state_ranks(prefill_tp: int, decode_tp: int) -> str:
    """Why ranks that send states of linear attention cannot be paired, in one sentence; empty when they can."""
    if prefill_tp == decode_tp:
        return ""
    return (
        f"prefill has {prefill_tp} attention ranks and decode {decode_tp}, and states of linear attention are sent "
        f"between equal numbers alone: start both workers with one {_ATTENTION_RANKS}"
    )


def rejection(message: Register, plan: PDPlan, ranks: Ranks, aux: AuxRows, draft: DraftRows | None = None) -> str:
    """Why the decode worker that sent `message` cannot be served from here, in one sentence; empty when it can.

    `draft` is what travels beside the plan's rows.
    """
    if message.protocol != VERSION:
        return f"decode speaks transfer protocol {message.protocol}, prefill {VERSION}: install one pdtrim-deploy"
    if message.digest != (digest := wire_digest(plan, draft)):
        return (
            f"plans differ: prefill serves plan {digest}, decode serves plan {message.digest}; "
            "start both workers from one bundle, and with the same draft model or none"
        )
    unlike = unlike_ranks(ranks.size, message.tp_size) or indivisible(ranks.kv_heads, message.tp_size)
    if draft is not None:
        unlike = unlike or unlike_draft_ranks(ranks.size, message.tp_size)
    if plan.model.states is not None:
        unlike = unlike or unlike_state_ranks(ranks.size, message.tp_size)
    if unlike:
        return unlike
    size, rank = message.tp_size, message.tp_rank
    if rank >= size or ranks.rank not in source_ranks(ranks.size, size, rank):
        return f"rank {rank} of {size} of decode has no KV to take from rank {ranks.rank} of {ranks.size} of prefill"
    if message.aux_item_bytes != aux.item_bytes:
        return "metadata rows differ: start both workers with the same SGLang version and options"
    return ""


def disagreement(
    message: Room, decode: Register, ranks: Ranks, others: Iterable[tuple[RoomInfo, Register | None]]
) -> str:
    """Why what a rank of decode says of a request does not go with what the others said, or nothing."""
    if message.destinations != (expected := ranks.destinations(decode)):
        return (
            f"{message.destinations} ranks of decode are to take this rank's KV, {expected} do of {decode.tp_size} "
            f"that divide attention there, and {ranks.size} here"
        )
    prompt = message.prompt_tokens, message.prefix_tokens
    for other, rank in others:
        if rank is not None and (rank.tp_size, rank.tp_rank) == (decode.tp_size, decode.tp_rank):
            return f"two decode workers are rank {decode.tp_rank} of {decode.tp_size} of this request"
        if (other.prompt_tokens, other.prefix_tokens) != prompt:
            return (
                f"ranks of decode differ: {other.prompt_tokens} prompt tokens of which they have "
                f"{other.prefix_tokens}, and {prompt[0]} of which they have {prompt[1]}"
            )
    return ""
