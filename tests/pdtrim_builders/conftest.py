"""Tiny stage folders: 6 blocks, of which prefill drops one and decode two; one rule full, the others 2 + 5 rows."""

from pathlib import Path

import pytest

from pdtrim_deploy.checkpoints import open_checkpoint
from pdtrim_deploy.checkpoints.surgery import write_stage
from pdtrim_deploy.plan import STAGES, Drop, Keep, KVSend, PDPlan

SPARSE = KVSend(mode="sparse", n_first=2, n_last=5)


@pytest.fixture(scope="session")
def make_stages(cache):
    """make_stages(source, out, dtype): write out/prefill and out/decode."""

    def make(source: Path, out: Path, dtype: str = "float32") -> Path:
        checkpoint = open_checkpoint(source, cache)
        prefill, decode = (tuple(Drop() if b in gone else Keep() for b in range(6)) for gone in ((3,), (1, 3)))
        kv = (KVSend(), SPARSE, SPARSE, KVSend(mode="sparse", n_first=0, n_last=3))
        plan = PDPlan(model=checkpoint.shape(dtype), prefill=prefill, decode=decode, kv=kv)
        for stage in STAGES:
            write_stage(checkpoint, out / stage, plan.layers(stage), dtype, plan.model_dump(mode="json"))
        return out

    return make


@pytest.fixture(scope="session")
def tiny_stages(tiny_dir, make_stages, tmp_path_factory):
    """tiny_stages("Qwen3ForCausalLM"): a folder with that family's prefill/ and decode/. Read it only."""
    made: dict[str, Path] = {}

    def folder(architecture: str) -> Path:
        if architecture not in made:
            made[architecture] = make_stages(tiny_dir(architecture), tmp_path_factory.mktemp("stages"))
        return made[architecture]

    return folder
