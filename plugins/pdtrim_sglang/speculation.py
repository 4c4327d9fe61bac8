"""Which speculative decoding can be served: drafted tokens are verified against the prompt rows that decode has."""

from __future__ import annotations

from typing import Any

from pdtrim_deploy.plan import PDPlan
from pdtrim_deploy.worker.config import WorkerConfig

# NGRAM has no KV of its own; the draft model's of the others travels natively (draft.py).
SPECULATION = ("NGRAM", "EAGLE", "EAGLE3", "NEXTN")


def check_speculation(server_args: Any, plan: PDPlan | None) -> None:
    """Raise RuntimeError where drafted tokens would be verified against rows that were not sent, or none knows how."""
    if (algorithm := server_args.speculative_algorithm) is None:
        return
    without = "start without --speculative-algorithm"
    if algorithm not in SPECULATION:
        raise RuntimeError(
            f"pdtrim: speculation by {algorithm} is not supported; allowed: {', '.join(SPECULATION)}: {without}"
        )
    if plan is not None and any(send.mode == "sparse" for send in plan.kv):  # to verify is no decode step
        raise RuntimeError(
            "pdtrim: the plan cuts layers, where drafted tokens would be verified against prompt rows that were not "
            f"sent: {without}, or serve a plan without cut layers"
        )
    if WorkerConfig.parse(server_args.json_model_override_args).engine is not None:
        raise RuntimeError(f"pdtrim: an engine's graph verifies no drafted tokens: {without}, or without the engine")
