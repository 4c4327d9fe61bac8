"""Hooks around SGLang's transfer of KV: our backends, and what page counts do not tell them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pdtrim_sglang.patches import passes


def backend_name(transport: str) -> str:
    """Value of `--disaggregation-transfer-backend` for a transport."""
    return f"pdtrim_{transport}"


def add_transfer_backends() -> None:
    from sglang.srt.arg_groups.choices import add_disagg_transfer_backend_choices
    from sglang.srt.disaggregation.utils import TransferBackend

    from pdtrim_sglang.transports import TRANSPORTS

    names = [backend_name(name) for name in TRANSPORTS]
    add_disagg_transfer_backend_choices(names)
    for value in names:  # an Enum cannot be subclassed once it has members: add to its tables
        if value not in TransferBackend._value2member_map_:
            member: Any = object.__new__(TransferBackend)
            member._name_, member._value_ = value.upper(), value
            member._sort_order_ = len(TransferBackend._member_names_)
            TransferBackend._member_names_.append(member._name_)
            TransferBackend._member_map_[member._name_] = member
            TransferBackend._value2member_map_[value] = member


def kv_class(original: Callable[..., Any], transfer_backend: Any, class_type: Any) -> Any:
    from sglang.srt.disaggregation.utils import KVClassType

    if not str(transfer_backend.value).startswith("pdtrim_") or class_type == KVClassType.KVARGS:
        return original(transfer_backend, class_type)
    from pdtrim_sglang.bootstrap import PDTrimBootstrapServer
    from pdtrim_sglang.manager import PDTrimKVManager
    from pdtrim_sglang.receiver import PDTrimKVReceiver
    from pdtrim_sglang.sender import PDTrimKVSender

    return {
        KVClassType.MANAGER: PDTrimKVManager,
        KVClassType.SENDER: PDTrimKVSender,
        KVClassType.RECEIVER: PDTrimKVReceiver,
        KVClassType.BOOTSTRAP_SERVER: PDTrimBootstrapServer,
    }[class_type]


def attach_pool(manager: Any, queue: Any) -> Any:
    attach = getattr(manager, "attach", None)
    if attach is not None:
        runner = queue.scheduler.tp_worker.model_runner
        draft_pool = queue.draft_token_to_kv_pool if manager.kv_args.num_draft_entries else None
        attach(queue.token_to_kv_pool, runner.model, draft_pool)
        if (side := getattr(manager, "prefill_side", None)) is not None:
            tree = queue.scheduler.tree_cache
            if (tails := getattr(runner, "pdtrim_tails", None)) is not None:
                side.tails = tails
                tails.follow(runner)
            if side.layerwise is not None:
                passes.follow(runner, tree, side.layerwise)
            passes.follow_pages(runner, tree, side)
    return manager


def prompt_tokens(req: Any) -> int:
    """Tokens whose KV prefill computes: on a re-bootstrap after retraction the tokens emitted so far belong to it.

    They still do when the request is retracted once more and comes back from its backup.
    """
    if getattr(req, "pd_rebootstrap_in_progress", False):
        req.pdtrim_prompt_tokens = len(req.origin_input_ids) + len(req.output_ids)
    return int(getattr(req, "pdtrim_prompt_tokens", len(req.origin_input_ids)))


def name_prompt_of_sender(original: Callable[..., bool], queue: Any, req: Any, *args: Any, **kwargs: Any) -> bool:
    created = original(queue, req, *args, **kwargs)
    named = getattr(req.disagg_kv_sender, "named", None) if created else None  # SGLang's own warm-up has a fake sender
    if named is not None:
        named(req.rid, len(req.origin_input_ids))
    return created


def name_prompt_of_receiver(original: Callable[..., None], queue: Any, decode_req: Any, *args: Any, **kw: Any) -> None:
    receiver, scheduler = decode_req.kv_receiver, queue.scheduler
    receiver.prompt_tokens, receiver.row = prompt_tokens(decode_req.req), decode_req.req.kv.req_pool_idx
    # Overlapped, a request that has ended has one more forward pass under way, which writes into slots given out again.
    overlapped = scheduler.enable_overlap and scheduler.device != "cpu"
    receiver.forward_done = scheduler.forward_stream.record_event() if overlapped else None
    original(queue, decode_req, *args, **kw)
