"""Tensor-parallel ranks: which GPUs of this machine each worker takes, and which numbers of ranks can be served."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.plan import PDPlan
from pdtrim_deploy.plan.heads import indivisible, unpairable

STATIC_SHARE = 0.85  # of a GPU's memory: weights and KV of all workers on it; the rest is for batches and CUDA graphs
# SGLang's own options for what decides here; its parser takes `--tp` for `--tp-size`.
_TP = re.compile(r"--(tp|tp-size|tensor-parallel-size)(=.*)?")
_DP = re.compile(r"--(dp|dp-size|data-parallel-size)(=.*)?")


@dataclass(frozen=True)
class Placement:
    """GPUs `first` to `first + ranks - 1`, one a rank.

    `memory_fraction` is `--mem-fraction-static` of a worker that shares a GPU: a share of what is free when it starts,
    after the workers placed before it. None: it shares none, and SGLang chooses.
    """

    first: int
    ranks: int
    memory_fraction: float | None = None

    @property
    def gpus(self) -> range:
        """Their numbers, as CUDA counts those that are visible."""
        return range(self.first, self.first + self.ranks)


def place(ranks: Sequence[int], gpus: int, share: bool = False) -> tuple[Placement, ...]:
    """Where workers of `ranks[i]` tensor-parallel ranks go on `gpus` GPUs; no GPU gets two ranks unless `share` allows.

    Raises:
        UserError: there are too few GPUs.

    """
    total = sum(ranks)
    if total <= gpus:
        return tuple(Placement(sum(ranks[:index]), count) for index, count in enumerate(ranks))
    if max(ranks) > gpus or not share:
        least = max(ranks) if share else total
        hint = "" if share else ", or let workers share a GPU: serve --share-gpus"
        raise UserError(
            f"{len(ranks)} workers of {', '.join(map(str, ranks))} ranks need {least} {_gpus(least)} and there "
            f"{'is' if gpus == 1 else 'are'} {gpus} here (nvidia-smi, CUDA_VISIBLE_DEVICES): start fewer workers or "
            f"ranks{hint}"
        )
    first, sets = 0, list[range]()
    for count in ranks:
        first = first if first + count <= gpus else 0
        sets.append(range(first, first + count))
        first += count
    most = max(sum(gpu in taken for taken in sets) for gpu in range(gpus))
    part = STATIC_SHARE / most
    before = [
        max(sum(gpu in taken for taken in sets[:index]) for gpu in assigned) for index, assigned in enumerate(sets)
    ]
    return tuple(
        Placement(assigned.start, len(assigned), round(part / (1 - part * earlier), 2))
        for assigned, earlier in zip(sets, before, strict=True)
    )


def require_ranks(plan: PDPlan, prefill: int, decode: int, device: str = "cuda") -> None:
    """UserError: a number of ranks that SGLang or the plugin cannot serve, known before any worker starts."""
    heads = plan.model.num_kv_heads
    for option, ranks in (("--tp-prefill", prefill), ("--tp-decode", decode)):
        reason = indivisible(heads, ranks)
        if device == "cpu" and heads % ranks:
            reason = f"SGLang pads {heads} KV heads for {ranks} ranks on a CPU, and the plan does not know such heads"
        if reason:
            valid = ", ".join(str(count) for count in range(1, heads + 1) if heads % count == 0)
            more = "" if device == "cpu" else f", or a multiple of {heads}"
            raise UserError(f"{option} {ranks}: {reason}; use one of {valid}{more}")
    if reason := unpairable(prefill, decode):
        raise UserError(f"--tp-prefill {prefill} --tp-decode {decode}: {reason}; give a multiple")
    if (states := plan.model.states) is not None:
        if prefill != decode:
            raise UserError(
                f"--tp-prefill {prefill} --tp-decode {decode}: states of linear attention are sent between equal "
                "numbers of ranks alone; give both one number"
            )
        if reason := states.indivisible(prefill):
            raise UserError(f"--tp-prefill {prefill}: {reason}; give a number that divides both")


def require_arguments(arguments: Sequence[str], option: str) -> None:
    """UserError: `arguments` of `option` choose ranks behind the back of `place`."""
    for word in arguments:
        if _TP.fullmatch(word):
            raise UserError(f"{option} has {word}: say --tp-prefill and --tp-decode instead, which place the ranks")
        if _DP.fullmatch(word) and "--enable-dp-attention" not in arguments:
            raise UserError(f"{option} has {word}: start more workers instead, --prefill and --decode")


def _gpus(count: int) -> str:
    return "GPU" if count == 1 else "GPUs"
