"""What a build computes, on the device against the CPU: blockwise execution, the PD oracle, the search for blocks.

As in a build on a GPU, the models are there and token ids on the host (`local/compute.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pdtrim_deploy.gpucheck.checks import Check, Figure
from pdtrim_deploy.gpucheck.tiny import VOCABULARY, Size, tiny_model
from pdtrim_deploy.models.oracle import PDOracle
from pdtrim_deploy.models.surgery import keep_blocks
from pdtrim_deploy.plan import Drop, Keep, KVSend, ModelShape, PDPlan
from pdtrim_deploy.plan.wire import WIRE_DTYPES, WireDtype
from pdtrim_deploy.pruning.objective import NextTokenLoss
from pdtrim_deploy.pruning.search.base import Problem
from pdtrim_deploy.pruning.search.greedy import Greedy

if TYPE_CHECKING:
    from pdtrim_deploy.models.blockwise import CausalLM

SIZE = Size()
PROMPT, TOKENS, SEQUENCES = 96, 160, 8
TOLERANCE = 1e-3  # nats, both in float32; a rounding that falls to the other side moves a quantised code by one
QUANTISED_TOLERANCE = 2e-2


def oracle_checks(device: torch.device | None = None) -> list[Check]:
    """The checks; `device` is the CUDA device otherwise. Models are there when the first runs."""

    @cache
    def models() -> tuple[CausalLM, CausalLM, Tensor]:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        ids = torch.randint(3, VOCABULARY, (SEQUENCES, TOKENS), generator=torch.Generator().manual_seed(1))
        there = device or torch.device("cuda", torch.cuda.current_device())
        return tiny_model(SIZE), tiny_model(SIZE).to(there), ids

    return [
        Check("oracle: blockwise execution", lambda: blockwise(*models())),
        *(Check(f"oracle: oracle, {wire}", partial(_oracle_of, models, wire)) for wire in WIRE_DTYPES),
        Check("oracle: search", lambda: search(*models())),
    ]


def _oracle_of(models: Callable[[], tuple[CausalLM, CausalLM, Tensor]], wire: WireDtype) -> Figure:
    return oracle(*models(), wire)


def blockwise(here: CausalLM, there: CausalLM, ids: Tensor) -> Figure:
    """Loss of each token by our own walk through the blocks on the device against transformers' on the CPU."""
    with torch.no_grad():
        logits = here(ids[:, :-1]).logits.log_softmax(-1)  # type: ignore[operator]
    expected = -logits.gather(2, ids[:, 1:, None])[..., 0]
    loss = NextTokenLoss(there, ids, batch=SEQUENCES)
    got = []
    for batch in range(loss.batches):
        hidden = loss.start(batch)
        for block in range(loss.blocks):
            hidden = loss.run(batch, (block,), hidden)
        got.append(loss.losses(batch, hidden).cpu())
    return _close(torch.cat(got), expected, TOLERANCE)


def oracle(here: CausalLM, there: CausalLM, ids: Tensor, wire: WireDtype) -> Figure:
    """Log-probabilities of a plan that drops blocks and cuts every other layer, on the device against the CPU."""
    plan, scores = _plan(wire), []
    for model in (here, there):
        pair = PDOracle(keep_blocks(model, plan.prefill_layers), keep_blocks(model, plan.decode_layers), plan)
        scores.append(pair.score(pair.prefill(ids[:, :PROMPT]), ids[:, PROMPT:]).cpu())
    return _close(scores[1], scores[0], TOLERANCE if wire == "native" else QUANTISED_TOLERANCE)


def search(here: CausalLM, there: CausalLM, ids: Tensor) -> Figure:
    """The same three blocks, removed in the same order."""
    removed = []
    for model in (here, there):
        problem = Problem(model, ids, NextTokenLoss(model, ids, PROMPT), 3)
        removed.append(Greedy(race_z=None).run(problem, lambda _: None).removed)
    if removed[0] != removed[1]:
        raise AssertionError(f"the CPU removes blocks {removed[0]}, the device {removed[1]}")
    return {"removed": ", ".join(map(str, removed[1]))}


def _close(got: Tensor, expected: Tensor, tolerance: float) -> Figure:
    error = float((got - expected).abs().max())
    if not error <= tolerance:  # not a number too
        raise AssertionError(f"worst error {error:.1e} nats, allowed {tolerance:.0e}")
    return {"worst_error_nats": error, "allowed_nats": tolerance, "tokens": got.numel()}


def _plan(wire: WireDtype) -> PDPlan:
    blocks = SIZE.num_hidden_layers
    shape = ModelShape(
        architecture="LlamaForCausalLM", fingerprint="random", num_blocks=blocks, head_dim=SIZE.head_dim,
        num_kv_heads=SIZE.num_key_value_heads, kv_dtype="float32",
    )  # fmt: skip
    cut: Any = {"mode": "sparse", "n_first": 4, "n_last": 24}
    sends = [KVSend(wire_dtype=wire, **(cut if layer % 2 else {})) for layer in range(blocks - 2)]
    prefill = tuple(Drop() if block == 6 else Keep() for block in range(blocks))
    decode = tuple(Drop() if block in (3, 6) else Keep() for block in range(blocks))
    return PDPlan(model=shape, prefill=prefill, decode=decode, kv=tuple(sends))
