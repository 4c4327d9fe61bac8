"""A decode worker that would get wrong KV is refused, each reason with its own sentence."""

import pytest
from pdtrim_sglang.messages import Register
from pdtrim_sglang.pairing import rejection
from pdtrim_sglang.protocol import VERSION
from pdtrim_sglang.rooms import AuxRows

from pdtrim_deploy.plan import ModelShape, PDPlan

SHAPE = ModelShape(architecture="X", fingerprint="f", num_blocks=1, num_kv_heads=1, head_dim=8, kv_dtype="float32")
PLAN = PDPlan.dense(SHAPE)
GOOD = {
    "session": "127.0.0.1:5", "host": "127.0.0.1", "control_port": 5, "protocol": VERSION, "digest": PLAN.digest,
    "data_port": 7, "tp_size": 1, "aux_item_bytes": (4, 64),
}  # fmt: skip


def why(**changes):
    return rejection(Register(**GOOD | changes), PLAN, 1, AuxRows((0, 0), (4, 64)))


def test_a_like_worker_is_served():
    assert why() == ""


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"digest": "a" * 64}, f"prefill serves plan {PLAN.digest}, decode serves plan {'a' * 64}"),
        ({"protocol": 99}, "transfer protocol 99"),
        ({"tp_size": 2}, "--tp-size"),
        ({"aux_item_bytes": (4,)}, "same SGLang version"),
    ],
)
def test_an_unlike_worker_is_refused(changes, sentence):
    assert sentence in why(**changes)


@pytest.mark.parametrize(("prefill", "decode"), [(1, 2), (2, 1)])
def test_another_tensor_parallelism_is_refused_whichever_side_has_more(prefill, decode):
    reason = rejection(Register(**GOOD | {"tp_size": decode}), PLAN, prefill, AuxRows((0, 0), (4, 64)))
    assert f"among {prefill} ranks in prefill, among {decode} in decode: start both workers with the same" in reason
