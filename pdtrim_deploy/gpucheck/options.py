"""Ways to serve a plan without cut layers: drafted tokens, a hierarchical cache, unlike numbers of ranks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from pdtrim_deploy.bundle import Bundle
from pdtrim_deploy.gpucheck import tiny
from pdtrim_deploy.gpucheck.checks import Check
from pdtrim_deploy.gpucheck.machine import gpus
from pdtrim_deploy.gpucheck.pair import Pair, fidelity_check, lazily

WHOLE = {"method": "none", "wire_dtype": "int8"}
# one branch, since SGLang verifies trees of more in pages of one token alone
NGRAM = ("--speculative-algorithm", "NGRAM", "--speculative-ngram-max-bfs-breadth", "1")
EAGLE = (
    "--speculative-algorithm", "EAGLE", "--speculative-num-steps", "2", "--speculative-eagle-topk", "1",
    "--speculative-num-draft-tokens", "3", "--speculative-draft-model-path",
)  # fmt: skip
DP_ATTENTION = ("--enable-dp-attention", "--dp-size", "2")


def speculation_checks(serve: Path, folder: Path, pair: Pair | None = None) -> list[Check]:
    """Pairs whose decode verifies drafted tokens, against the oracle.

    EAGLE's draft model is a random one: its KV travels, and hardly a token of it is accepted.
    """
    pair, bundle, draft = pair or Pair(serve), lazily(folder / "tiny", WHOLE), folder / "draft"
    ngram = replace(pair, decode_args=(*pair.decode_args, *NGRAM))
    both = (*EAGLE, str(draft))
    eagle = replace(pair, prefill_args=(*pair.prefill_args, *both), decode_args=(*pair.decode_args, *both))

    def drafted() -> Bundle:
        tiny.save_draft(draft)
        return bundle()

    return [
        fidelity_check("speculation: NGRAM on decode", bundle, ngram),
        fidelity_check("speculation: EAGLE", drafted, eagle),
    ]


def cache_checks(serve: Path, folder: Path, pair: Pair | None = None) -> list[Check]:
    """Prefill with SGLang's hierarchical cache in host memory, against the oracle."""
    way = replace(pair or Pair(serve), prefill_args=("--enable-hierarchical-cache",))
    return [fidelity_check("hierarchical cache on prefill", lazily(folder, WHOLE), way)]


def rank_checks(serve: Path, folder: Path, pair: Pair | None = None) -> list[Check]:
    """Attention divided among unlike numbers of ranks, against the oracle; ranks of a worker cannot share a GPU."""
    pair, count = pair or Pair(serve), gpus()
    usual, single = lazily(folder / "usual", WHOLE), lazily(folder / "single", WHOLE, tiny.Size(num_key_value_heads=1))
    ways: dict[str, tuple[Callable[[], Bundle], Pair]] = {
        "TP 2 to 1": (usual, replace(pair, tp_prefill=2)),
        "TP 1 to 2": (usual, replace(pair, tp_decode=2)),
        "copied heads, TP 2 to 2 of one KV head": (single, replace(pair, tp_prefill=2, tp_decode=2)),
        "DP attention on decode, TP 1 to 2": (usual, replace(pair, tp_decode=2, decode_args=DP_ATTENTION)),
    }
    skip = "" if count >= 2 else f"needs 2 GPUs, and this machine has {count}"
    return [fidelity_check(f"ranks: {name}", bundle, way, skip=skip) for name, (bundle, way) in ways.items()]
