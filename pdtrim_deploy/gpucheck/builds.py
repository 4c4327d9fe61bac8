"""A whole build on the device against one on the CPU: the same plan, and weights that differ by rounding alone."""

from __future__ import annotations

import tempfile
from pathlib import Path

from safetensors.torch import load_file

from pdtrim_deploy.bundle import Bundle
from pdtrim_deploy.gpucheck import tiny
from pdtrim_deploy.gpucheck.bundles import tiny_recipe
from pdtrim_deploy.gpucheck.checks import Check, Figure
from pdtrim_deploy.local.cache import Cache
from pdtrim_deploy.local.compute import ON_CPU, Compute
from pdtrim_deploy.pipeline import build
from pdtrim_deploy.plan import STAGES

TOLERANCE = 0.02  # of a tensor's largest value: stages are float16, and healing multiplies what sums round
SECTIONS = {
    "pruning": {"method": "greedy", "prefill_blocks": 1, "decode_blocks": 2},
    "healing": {"compensation": "least-squares", "kv_only_blocks": 1, "sequences": 8, "length": 32,
                "decode_steps": 2, "batch": 2},
    "kv": {"method": "budget", "reduction": 3.0, "sequences": 3, "prompt_tokens": 40, "continuation_tokens": 6,
           "sparse_choices": [[4, 8]], "wire_choices": ["int8", "int4"]},
}  # fmt: skip


def build_checks(device: str = "cuda:0") -> list[Check]:
    """Search, least squares, gradients, choice of KV and key offsets in one build."""
    return [Check("build: plan and weights", lambda: same_build(device), 20)]


def same_build(device: str) -> Figure:
    """Plans to the letter, but for the digest of key offsets; the largest difference of a weight.

    Raises:
        AssertionError: they differ.

    """
    with tempfile.TemporaryDirectory(prefix="pdtrim-build-") as name:
        folder = Path(name)
        recipe = tiny_recipe(folder, tiny.save(folder / "model"), **SECTIONS)
        here, there = (
            build(recipe, folder / str(place), Cache(folder / f"cache-{place}"), print, compute=compute)
            for place, compute in enumerate((ON_CPU, Compute((device,))))
        )
        plans = [bundle.plan.with_key_offsets(None) for bundle in (here, there)]
        if plans[0] != plans[1]:
            raise AssertionError(f"the CPU decides {_decisions(here)}, the device {_decisions(there)}")
        worst = max(_difference(here, there, stage) for stage in STAGES)
    if not worst <= TOLERANCE:
        raise AssertionError(f"a weight differs by {worst:.1e} of its tensor's largest, allowed {TOLERANCE}")
    return {"worst_weight_error": worst, "allowed": TOLERANCE}


def _decisions(bundle: Bundle) -> str:
    plan = bundle.plan
    sends = ", ".join(f"{send.row_names} in {send.wire_dtype}" for send in plan.kv)
    return f"prefill {plan.prefill_layers}, decode {plan.decode_layers}, KV {sends}"


def _difference(here: Bundle, there: Bundle, stage: str) -> float:
    """The largest difference of a weight of a stage, as a share of its tensor's largest."""
    weights = [load_file(bundle.path / stage / "model.safetensors") for bundle in (here, there)]
    pairs = ((weights[0][name].float(), weights[1][name].float()) for name in weights[0])
    return max(float((a - b).abs().max() / a.abs().max().clamp_min(1e-12)) for a, b in pairs)
