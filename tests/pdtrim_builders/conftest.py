"""Tiny stage folders: 6 blocks, of which prefill drops one and decode two; one rule full, the others 2 + 5 rows."""

from pathlib import Path

import pytest
from torch import Tensor

from pdtrim_deploy.models import open_checkpoint
from pdtrim_deploy.models.loading import load_model
from pdtrim_deploy.models.surgery import write_stage
from pdtrim_deploy.plan import STAGES, Drop, Keep, KVOnly, KVSend, PDPlan, WithoutAttention, WithoutMLP

NO_ATTENTION, NO_MLP = WithoutAttention(), WithoutMLP()
SPARSE = KVSend(mode="sparse", n_first=2, n_last=5)


@pytest.fixture(scope="session")
def make_stages(cache):
    """make_stages(source, out, dtype, alone): write both stages; prefill has block `alone` for K and V only."""

    def make(source: Path, out: Path, dtype: str = "float32", alone: int | None = None) -> Path:
        checkpoint = open_checkpoint(source, cache)
        prefill, decode = (tuple(Drop() if b in gone else Keep() for b in range(6)) for gone in ((3,), (1, 3)))
        prefill = tuple(KVOnly() if b == alone else action for b, action in enumerate(prefill))
        kv = (KVSend(), SPARSE, SPARSE, KVSend(mode="sparse", n_first=0, n_last=3, share=300))
        plan = PDPlan.uncut(checkpoint.shape(dtype), prefill, decode).with_kv(kv)
        changed = {} if alone is None else {alone: _silent(source, alone)}
        for stage in STAGES:
            data, new = plan.model_dump(mode="json"), changed if stage == "prefill" else {}
            write_stage(checkpoint, out / stage, plan.layers(stage), dtype, data, replacements=new)
        return out

    return make


@pytest.fixture
def half_stages(cache, tiny_dir, tmp_path):
    """half_stages("Qwen3ForCausalLM"): a folder with both stages of that family, whose blocks lack sublayers.

    Prefill has 5 layers, of which one without attention and one without MLP; decode has 5, two and one.
    """

    def folder(architecture: str) -> Path:
        checkpoint, keep = open_checkpoint(tiny_dir(architecture), cache), Keep()
        prefill = (keep, NO_ATTENTION, keep, Drop(), NO_MLP, keep)
        decode = (NO_ATTENTION, NO_ATTENTION, NO_MLP, Drop(), keep, keep)
        plan = PDPlan(model=checkpoint.shape("float32"), prefill=prefill, decode=decode, kv=(SPARSE, KVSend(), SPARSE))
        for stage in STAGES:
            data, missing = plan.model_dump(mode="json"), plan.missing(stage)
            write_stage(checkpoint, tmp_path / stage, plan.layers(stage), "float32", data, missing=missing)
        return tmp_path

    return folder


def _silent(source: Path, block: int) -> dict[str, Tensor]:
    layer = load_model(source).model.layers[block]
    return {
        name: layer.get_parameter(name).detach() * 0 for name in ("self_attn.o_proj.weight", "mlp.down_proj.weight")
    }


@pytest.fixture(scope="session")
def tiny_stages(tiny_dir, make_stages, tmp_path_factory):
    """tiny_stages("Qwen3ForCausalLM"): a folder with that family's prefill/ and decode/. Read it only."""
    folders: dict[str, Path] = {}

    def folder(architecture: str) -> Path:
        if architecture not in folders:
            folders[architecture] = make_stages(tiny_dir(architecture), tmp_path_factory.mktemp("stages"))
        return folders[architecture]

    return folder
