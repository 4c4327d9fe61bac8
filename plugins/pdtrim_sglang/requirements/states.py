"""States of linear attention: which models, options and pools of states can be served."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from pdtrim_deploy.plan import LinearStates, PDPlan

if TYPE_CHECKING:
    from pdtrim_sglang.state_slots import StateSlots


def check_states_served(server_args: Any, kinds: Sequence[str], plan: PDPlan | None) -> None:
    """Raise RuntimeError where SGLang would send state of these `kinds` (`StateType`) that the plugin does not."""
    states = None if plan is None else plan.model.states
    if any(kind != "swa" and (kind != "mamba" or states is None) for kind in kinds):
        raise RuntimeError(
            "pdtrim: of this model SGLang keeps state beside KV (linear attention, an index), which is sent of a "
            f"bundle of a known family alone: build one, or start without a pdtrim backend ({', '.join(kinds)})"
        )
    if plan is None or states is None:
        return
    if any(send.mode != "full" for send in plan.kv):
        raise RuntimeError(
            "pdtrim: the plan cuts layers of a model with linear attention, which is not known to work: build the "
            "bundle with kv.method none"
        )
    if server_args.speculative_algorithm is not None:
        raise RuntimeError(
            "pdtrim: speculation goes back to earlier states of linear attention, which was not tried beside states "
            "that were sent: start without --speculative-algorithm"
        )
    if server_args.disaggregation_mode == "decode" and server_args.disaggregation_decode_enable_radix_cache:
        raise RuntimeError(
            "pdtrim: decode's radix cache would go on from states behind whole answers, whose prompts were computed by "
            "prefill: start without --disaggregation-decode-enable-radix-cache"
        )


def check_state_pool(plan: PDPlan, slots: StateSlots | None, ranks: int) -> None:
    """Raise RuntimeError when a worker's pool of states is not the one that the plan describes."""
    if plan.model.states is None:
        if slots is not None:
            raise RuntimeError("pdtrim: this model keeps states, and the plan has none: serve the bundle's checkpoint")
        return
    if slots is None:
        raise RuntimeError(
            "pdtrim: the plan sends states of linear attention, and this worker has no pool of them: serve the "
            "bundle's checkpoint with SGLang's own model class"
        )
    check_states(plan.model.states, slots, ranks)


def check_states(states: LinearStates, slots: StateSlots, ranks: int) -> None:
    """Raise RuntimeError when the pool of this worker is not the one that the plan describes."""
    if reason := states.indivisible(ranks):
        raise RuntimeError(f"pdtrim: {reason}: start with a --tp-size that divides both")
    if slots.layers != len(states.blocks):
        raise RuntimeError(
            f"pdtrim: the plan gives {len(states.blocks)} layers a state, the loaded model has {slots.layers}: serve "
            "the bundle's checkpoint"
        )
    sides = (
        ("convolution", slots.conv, states.conv_shape(ranks), states.conv_dtype, "SGLANG_MAMBA_CONV_DTYPE"),
        ("recurrent", slots.recurrent, states.recurrent_shape(ranks), states.recurrent_dtype, "--mamba-ssm-dtype"),
    )
    for name, side, shape, dtype, option in sides:
        if tuple(side.shape[2:]) != shape:
            raise RuntimeError(
                f"pdtrim: the plan expects a {name} state of {shape}, the pool has {tuple(side.shape[2:])}: serve the "
                "bundle's checkpoint, where SGLang neither pads heads nor lays states out for AMX"
            )
        if side.dtype != getattr(torch, dtype):
            raise RuntimeError(
                f"pdtrim: the plan was made for a {name} state in {dtype}, this worker's is {side.dtype}: start it "
                f"with {option} {dtype}"
            )
