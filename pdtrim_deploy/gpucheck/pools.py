"""Pools and models that are not the usual: fp8 rows, sliding windows, latents, states of linear attention."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

from pdtrim_deploy.gpucheck import tiny
from pdtrim_deploy.gpucheck.bundles import CUT, lazily
from pdtrim_deploy.gpucheck.checks import Check
from pdtrim_deploy.gpucheck.pair import Pair, fidelity_check
from pdtrim_deploy.plan.wire import SMALLER_THAN_FP8


def fp8_pool_checks(serve: Path, folder: Path, pair: Pair | None = None) -> list[Check]:
    """fp8 KV pools, each wire dtype once, whole and cut layers in turn, against the oracle; e5m2 once.

    As in the oracle, prefill's torch_native reads a chunk's own rows after they were rounded (Triton before), and no
    query is rounded (fa3 and trtllm_mha round it).
    """
    prefill, decode = (("--attention-backend", backend) for backend in ("torch_native", "triton"))
    pair = replace(pair or Pair(serve), prefill_args=prefill, decode_args=decode)
    checks = []
    for place, (pool, wire) in enumerate([*product(("fp8_e4m3",), SMALLER_THAN_FP8), ("fp8_e5m2", "native")]):
        rule = {"method": "none"} if place % 2 else CUT
        bundle = lazily(folder / f"{pool}-{wire}", {**rule, "wire_dtype": wire, "pool_dtype": pool})
        checks.append(fidelity_check(f"fp8 pool: {pool}, {wire}, {rule['method']} cut", bundle, pair))
    return checks


def window_checks(serve: Path, folder: Path, pair: Pair | None = None) -> list[Check]:
    """Models with sliding windows, in SGLang's pool of windows where it has one, against the oracle."""
    kv = {"method": "none", "wire_dtype": "int8"}
    return [
        fidelity_check(
            f"windows: {architecture.removesuffix('ForCausalLM')}, int8",
            lazily(folder / architecture, kv, architecture=architecture, pruning={}),
            pair or Pair(serve),
        )
        for architecture in tiny.WINDOWED
    ]


def latent_checks(serve: Path, folder: Path, pair: Pair | None = None) -> list[Check]:
    """Models with latents (MLA), under the attention that SGLang takes for them, against the oracle."""
    return _uncut_checks("latents", product(tiny.LATENT, ("native", "int4")), folder, pair or Pair(serve))


def state_checks(serve: Path, folder: Path, pair: Pair | None = None) -> list[Check]:
    """Models with linear attention, whose states travel natively beside native rows, against the oracle.

    In float16 and of few blocks: behind roundings of bfloat16, or of quantised rows, one wrong row is not seen here.
    """
    cases, size = product(tiny.STATEFUL, ("native",)), tiny.Size(num_hidden_layers=4)
    return _uncut_checks("states", cases, folder, pair or Pair(serve), size=size)


def _uncut_checks(
    subject: str, cases: Iterable[tuple[str, str]], folder: Path, pair: Pair, **options: Any
) -> list[Check]:
    """Of each architecture and wire dtype: all blocks and all rows, by `options` of its tiny bundle."""
    return [
        fidelity_check(
            f"{subject}: {architecture.removesuffix('ForCausalLM')}, {wire}",
            lazily(
                folder / f"{architecture}-{wire}",
                {"method": "none", "wire_dtype": wire},
                architecture=architecture,
                pruning={},
                **options,
            ),
            pair,
        )
        for architecture, wire in cases
    ]
