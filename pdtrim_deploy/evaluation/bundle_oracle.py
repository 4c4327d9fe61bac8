"""The PD oracle of a bundle: its stage models as written, behind its plan."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from pdtrim_deploy.bundle import Bundle
from pdtrim_deploy.kvcache.key_offsets import KeyOffsets
from pdtrim_deploy.local.compute import Compute
from pdtrim_deploy.models.blockwise import CausalLM
from pdtrim_deploy.models.body import check_body
from pdtrim_deploy.models.oracle import PDOracle
from pdtrim_deploy.models.prompt_tail import with_body
from pdtrim_deploy.plan import STAGES
from pdtrim_deploy.plan.blocks import BODY


def oracle_of(
    bundle: Bundle, note: Callable[[str], None], compute: Compute | None, *, rounds_inputs: bool = False
) -> PDOracle:
    """Load the checkpoints, each once, as `load_to_compute` does; `compute` None: on this CPU, in what it is fast at.

    Of a unified plan this is the plain model: decode reads all that prefill wrote, and its weights are prefill's. The
    oracle's plan is then that of a pair of the same blocks, whose KV rules its controls may change.
    """
    from pdtrim_deploy.models.on_devices import load_to_compute

    plan, dtype = bundle.plan, bundle.plan.model.kv_dtype
    check_body(bundle.prefill_dir, plan)

    def load(name: str, folder: Path) -> CausalLM:
        return load_to_compute(name, folder, dtype, note, compute, rounds_inputs=rounds_inputs)

    names = ("unified",) if plan.unified else STAGES
    models = {f: load(name, bundle.path / f) for f, name in zip(plan.checkpoints, names, strict=True)}
    prefill, decode = models[plan.folder("prefill")], models[plan.folder("decode")]
    if plan.kv_only_tail:
        prefill = with_body(prefill, load("prefill body's", bundle.prefill_dir / BODY), plan)
    return PDOracle(prefill, decode, plan.with_parts(unified=False), KeyOffsets.read(bundle.prefill_dir, plan))
