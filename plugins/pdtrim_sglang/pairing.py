"""Which decode workers a prefill worker serves, and how SGLang remembers a request's destination."""

from __future__ import annotations

from dataclasses import dataclass

from pdtrim_deploy.plan import PDPlan
from pdtrim_sglang.messages import Register
from pdtrim_sglang.protocol import VERSION
from pdtrim_sglang.rooms import AuxRows


@dataclass(frozen=True)
class RoomInfo:
    """A request's destination, in the form that SGLang's CommonKVManager keeps in `transfer_infos`."""

    session: str
    endpoint: str
    dst_port: int
    prompt_tokens: int
    prefix_tokens: int
    required_dst_info_num: int
    is_dummy: bool = False


def unlike_ranks(prefill_tp: int, decode_tp: int) -> str:
    """Why ranks of these attention TP sizes cannot be paired, in one sentence; empty when they can."""
    if prefill_tp == decode_tp:
        return ""
    return (
        f"attention is divided among {prefill_tp} ranks in prefill, among {decode_tp} in decode: start both workers "
        "with the same --tp-size, and both with --enable-dp-attention and the same --dp-size or both without"
    )


def rejection(message: Register, plan: PDPlan, tp_size: int, aux: AuxRows) -> str:
    """Why the decode worker that sent `message` cannot be served from here, in one sentence; empty when it can."""
    if message.protocol != VERSION:
        return f"decode speaks transfer protocol {message.protocol}, prefill {VERSION}: install one pdtrim-deploy"
    if message.digest != plan.digest:
        return (
            f"plans differ: prefill serves plan {plan.digest}, decode serves plan {message.digest}; "
            "start both workers from one bundle"
        )
    if unlike := unlike_ranks(tp_size, message.tp_size):
        return unlike
    if message.aux_item_bytes != aux.item_bytes:
        return "metadata rows differ: start both workers with the same SGLang version and options"
    return ""
