"""Pairs that would answer with wrong text, or never, are refused with a sentence, and nothing hangs."""

import json

import pytest

from pdtrim_deploy.checkpoints import open_checkpoint
from pdtrim_deploy.checkpoints.surgery import write_stage
from pdtrim_deploy.errors import ServingError
from pdtrim_deploy.plan import Drop, Keep, KVSend, PDPlan

pytestmark = [pytest.mark.serve, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def stages(tiny_model, tmp_path_factory, real_cache):
    """`stages(name, dropped)`: the two stage checkpoints of a tiny model, decode without `dropped`."""
    folder = tmp_path_factory.mktemp("tiny")
    checkpoint = open_checkpoint(tiny_model(folder / "model"), real_cache)

    def write(name, dropped, sparse=False):
        shape = checkpoint.shape("float32")
        decode = tuple(Drop() if block in dropped else Keep() for block in range(shape.num_blocks))
        send = KVSend(mode="sparse", n_first=2, n_last=3) if sparse else KVSend()
        kept = shape.num_blocks - len(dropped)
        plan = PDPlan(model=shape, prefill=(Keep(),) * shape.num_blocks, decode=decode, kv=(send,) * kept)
        for stage in ("prefill", "decode"):
            data = plan.model_dump(mode="json")
            write_stage(checkpoint, folder / name / stage, plan.layers(stage), "float32", data)
        return plan, folder / name / "prefill", folder / name / "decode"

    return write


def test_workers_of_different_plans_are_refused_naming_both(stages, serving):
    one, prefill, _ = stages("one", {2})
    other, _, decode = stages("other", {2}, sparse=True)
    with pytest.raises(ServingError) as refusal, serving(prefill, decode, dtype="float32"):
        pass
    assert one.digest in str(refusal.value)
    assert other.digest in str(refusal.value)
    assert "start both workers from one bundle" in str(refusal.value)


def test_stock_checkpoints_of_different_depth_are_refused(stages, serving):
    """Stock SGLang answers such a pair with wrong text, or hangs."""
    _, prefill, decode = stages("stock", {1, 3})
    for folder in (prefill, decode):
        config = json.loads((folder / "config.json").read_text())
        del config["pdtrim"]
        (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ServingError, match=r"plans differ: prefill serves plan .* decode serves plan"):  # noqa: SIM117
        with serving(prefill, decode, dtype="float32"):
            pass


def test_a_worker_with_another_kv_dtype_says_so_and_dies(stages, serving):
    _, prefill, decode = stages("dtype", set())
    with pytest.raises(ServingError, match="plan was made for a float32 KV cache"):  # noqa: SIM117
        with serving(prefill, decode, dtype="bfloat16"):
            pass
