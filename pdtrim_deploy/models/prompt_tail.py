"""Prefill models whose plan has a tail: a prompt's last tokens go through another model, over the same K and V.

The prefill model itself, whose last blocks run for their K and V alone, takes the tokens before them (the body). The
tail's model has the same layers with the model's own weights. So what reads a prompt's end is the dense model, and a
prompt no longer than the tail is the dense model's as a whole.
"""

from __future__ import annotations

from pdtrim_deploy.models.blockwise import CausalLM
from pdtrim_deploy.models.surgery.in_memory import keep_blocks, renumber
from pdtrim_deploy.plan import PDPlan

_TAIL = "pdtrim_tail_model"  # attribute of a prefill model


def with_body(tail: CausalLM, last: CausalLM, plan: PDPlan) -> CausalLM:
    """The prefill model of checkpoints on disk: `tail`, but for its last layers, which are those of `last`."""
    model = keep_blocks(tail, range(len(tail.model.layers)))
    for number, layer in zip(plan.kv_only_layers, last.model.layers, strict=True):
        renumber(layer, number)
        model.model.layers[number] = layer
    return attach(model, tail)


def attach(model: CausalLM, tail: CausalLM) -> CausalLM:
    """Give a prefill model that of its prompts' tails; returns it.

    This is no part of the model for transformers: what saves, moves or counts parameters does not see it.
    """
    model.__dict__[_TAIL] = tail
    return model


def tail_model(model: CausalLM, plan: PDPlan) -> CausalLM | None:
    """That of the tails of the plan's prompts; None where it has none.

    Raises:
        ValueError: the plan has a tail, and the prefill model was given no model of it, or one of other layers.

    """
    if not plan.kv_only_tail:
        return None
    tail = model.__dict__.get(_TAIL)
    if tail is None or len(tail.model.layers) != len(model.model.layers):
        raise ValueError("the prefill model has no model of its prompts' tails, which the plan asks for")
    return tail
