"""Options of workers: sizes, pages and sends; drafted tokens, prefix caches and unlike numbers of ranks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from pdtrim_deploy.bundle import Bundle
from pdtrim_deploy.gpucheck import tiny
from pdtrim_deploy.gpucheck.bundles import CUT, lazily
from pdtrim_deploy.gpucheck.checks import Check
from pdtrim_deploy.gpucheck.pair import Pair, fidelity_check
from pdtrim_deploy.loadtest import Scenario
from pdtrim_deploy.serving.environment import gpu_count

WHOLE = {"method": "none", "wire_dtype": "int8"}
SOME_CUT = {"method": "attention-mass", "sparse_layers": 3, "n_first": 4, "n_last": 64}
# one branch, since SGLang verifies trees of more in pages of one token alone
NGRAM = ("--speculative-algorithm", "NGRAM", "--speculative-ngram-max-bfs-breadth", "1")
EAGLE = (
    "--speculative-algorithm", "EAGLE", "--speculative-num-steps", "2", "--speculative-eagle-topk", "1",
    "--speculative-num-draft-tokens", "3", "--speculative-draft-model-path",
)  # fmt: skip
RADIX = ("--disaggregation-decode-enable-radix-cache",)
HIERARCHICAL = ("--enable-hierarchical-cache", "--hicache-ratio", "4")
# More than a small pool holds, less than it and the host: what was there before is in the host's memory afterwards.
EVICTING = Scenario.closed(5, 1, (2000, 2000), (4, 4), warmup=0, deadline_s=120)
DP_ATTENTION = ("--enable-dp-attention", "--dp-size", "2")


def worker_checks(serve: Path, folder: Path, pair: Pair | None = None) -> list[Check]:
    """Tiny pairs whose plan cuts every layer, against the oracle: as `serve` starts them, and with other options."""
    pair, bundle = pair or Pair(serve), lazily(folder, CUT)
    return [
        fidelity_check("workers: sizes that SGLang chooses", bundle, replace(pair, small=False), seconds=60),
        fidelity_check("workers: pages of 16 tokens", bundle, replace(pair, page_size=16)),
        fidelity_check("workers: rows sent by layer", bundle, replace(pair, send_by_layer=True)),
    ]


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
    """Prefix caches, against the oracle, before prompts are evicted and after: in host memory, and decode's own."""
    pair, whole, some = pair or Pair(serve), lazily(folder / "whole", WHOLE), lazily(folder / "some", SOME_CUT)
    variants = {
        "hierarchical cache on prefill": (whole, replace(pair, prefill_args=HIERARCHICAL)),
        "radix cache on decode": (whole, replace(pair, decode_args=RADIX)),
        "radix cache on decode, some layers cut": (some, replace(pair, decode_args=RADIX)),
        "hierarchical cache on decode": (whole, replace(pair, decode_args=(*RADIX, *HIERARCHICAL))),
    }
    return [
        fidelity_check(name, bundle, variant, between=EVICTING, seconds=45)
        for name, (bundle, variant) in variants.items()
    ]


def rank_checks(serve: Path, folder: Path, pair: Pair | None = None) -> list[Check]:
    """Attention divided among unlike numbers of ranks, against the oracle; ranks of a worker cannot share a GPU."""
    pair, count = pair or Pair(serve), gpu_count()
    usual, single = lazily(folder / "usual", WHOLE), lazily(folder / "single", WHOLE, tiny.Size(num_key_value_heads=1))
    grouped = lazily(folder / "grouped", WHOLE, architecture="Qwen3ForCausalLM")  # SGLang's Llama knows no DP attention
    variants: dict[str, tuple[Callable[[], Bundle], Pair]] = {
        "TP 2 to 1": (usual, replace(pair, tp_prefill=2)),
        "TP 1 to 2": (usual, replace(pair, tp_decode=2)),
        "copied heads, TP 2 to 2 of one KV head": (single, replace(pair, tp_prefill=2, tp_decode=2)),
        "DP attention on decode, TP 1 to 2": (grouped, replace(pair, tp_decode=2, decode_args=DP_ATTENTION)),
    }
    skip = "" if count >= 2 else f"needs 2 GPUs, and workers see {count} here (nvidia-smi, CUDA_VISIBLE_DEVICES)"
    return [
        fidelity_check(f"ranks: {name}", bundle, variant, skip=skip) for name, (bundle, variant) in variants.items()
    ]
