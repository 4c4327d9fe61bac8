"""Tensor-parallel ranks: which GPUs of this machine each worker takes, and which numbers of ranks can be served."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.plan import PDPlan
from pdtrim_deploy.plan.heads import indivisible, unpairable

STATIC_SHARE = 0.85  # of a GPU's memory: weights and KV of all workers on it; the rest is for batches and CUDA graphs
# SGLang's own options for what decides here; its parser takes `--tp` for `--tp-size`.
_TP = re.compile(r"--(tp|tp-size|tensor-parallel-size)(=.*)?")
_PARSER = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
_PARSER.add_argument("--attn-dp-size", "--attn-dp", "--attention-data-parallel-size", type=int, default=1)
_PARSER.add_argument("--dp-size", "--dp", "--data-parallel-size", type=int, default=1)
_PARSER.add_argument("--enable-dp-attention", action="store_true")


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


def attention_groups(arguments: Sequence[str]) -> int:
    """Groups of ranks among which DP attention divides requests, by `arguments` of SGLang; 1: there is none.

    Raises:
        UserError: an option that is no number.

    """
    return _data_parallel(arguments)[1]


def _data_parallel(arguments: Sequence[str]) -> tuple[int, int]:
    """Replicas, and groups of DP attention in each.

    `--dp-size N --enable-dp-attention` is SGLang 0.5.23's deprecated spelling (arg_groups/parallel_hook.py).
    """
    try:
        known, _ = _PARSER.parse_known_args(arguments)
    except argparse.ArgumentError as error:
        raise UserError(f"arguments of SGLang: {error}; give a number of groups") from None
    deprecated = known.enable_dp_attention and known.attn_dp_size == 1
    replicas, groups = (1, known.dp_size) if deprecated else (known.dp_size, known.attn_dp_size)
    return max(1, replicas), max(1, groups)


def require_ranks(
    plan: PDPlan, prefill: int, decode: int, device: str = "cuda", groups: tuple[int, int] = (1, 1)
) -> None:
    """UserError: a number of ranks that SGLang or the plugin cannot serve, known before any worker starts.

    `groups` are prefill's and decode's `attention_groups`: heads and states are divided among the ranks of a group.
    """
    heads, sizes = plan.model.num_kv_heads, f"--tp-prefill {prefill} --tp-decode {decode}"
    for option, ranks, count in (("--tp-prefill", prefill, groups[0]), ("--tp-decode", decode, groups[1])):
        if ranks % count:
            raise UserError(f"{option} {ranks}: --attn-dp-size {count} divides these ranks; give a multiple of {count}")
        reason = indivisible(heads, ranks // count)
        if device == "cpu" and heads % ranks:
            reason = f"SGLang pads {heads} KV heads for {ranks} ranks on a CPU, and the plan does not know such heads"
        if reason:
            step = 1 if device == "cpu" else count
            valid = ", ".join(str(divisor * step) for divisor in range(1, heads + 1) if heads % divisor == 0)
            more = "" if device == "cpu" else f", or a multiple of {heads * step}"
            raise UserError(f"{option} {ranks}: {reason}; use one of {valid}{more}")
    if groups != (1, 1):
        sizes += f", divided by --attn-dp-size {groups[0]} and {groups[1]}"
    prefill, decode = prefill // groups[0], decode // groups[1]
    if reason := unpairable(prefill, decode):
        raise UserError(f"{sizes}: {reason}; give a multiple")
    if (states := plan.model.states) is not None:
        if prefill != decode:
            raise UserError(
                f"{sizes}: states of linear attention are sent between equal numbers of ranks alone; give both one "
                "number"
            )
        if reason := states.indivisible(prefill):
            raise UserError(f"{sizes}: {reason}; give a number that divides both")


def require_arguments(arguments: Sequence[str], option: str) -> None:
    """UserError: `arguments` of `option` choose ranks behind the back of `place`."""
    for word in arguments:
        if _TP.fullmatch(word):
            raise UserError(f"{option} has {word}: say --tp-prefill and --tp-decode instead, which place the ranks")
    if (replicas := _data_parallel(arguments)[0]) > 1:
        raise UserError(f"{option} has --dp-size {replicas}: start more workers instead, --prefill and --decode")


def _gpus(count: int) -> str:
    return "GPU" if count == 1 else "GPUs"
