"""A decode worker that would get wrong KV is refused, each reason with its own sentence."""

import pytest
from pdtrim_sglang.messages import Register
from pdtrim_sglang.pairing import Ranks, rejection
from pdtrim_sglang.protocol import VERSION
from pdtrim_sglang.rooms import AuxRows

from pdtrim_deploy.plan import ModelShape, PDPlan

SHAPE = ModelShape(architecture="X", fingerprint="f", num_blocks=1, num_kv_heads=1, head_dim=8, kv_dtype="float32")
PLAN = PDPlan.dense(SHAPE)
GOOD = {
    "session": "127.0.0.1:5", "host": "127.0.0.1", "control_port": 5, "protocol": VERSION, "digest": PLAN.digest,
    "data_port": 7, "tp_size": 1, "tp_rank": 0, "aux_item_bytes": (4, 64),
}  # fmt: skip


def why(**changes):
    return rejection(Register(**GOOD | changes), PLAN, Ranks(1, 0, 4), AuxRows((0, 0), (4, 64)))


def test_a_like_worker_is_served():
    assert why() == ""


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"digest": "a" * 64}, f"prefill serves plan {PLAN.digest}, decode serves plan {'a' * 64}"),
        ({"protocol": 99}, "transfer protocol 99"),
        ({"tp_size": 3}, "4 KV heads can neither be divided among 3 ranks"),
        ({"tp_size": 2, "tp_rank": 2}, "rank 2 of 2 of decode has no KV to take from rank 0 of 1 of prefill"),
        ({"aux_item_bytes": (4,)}, "same SGLang version"),
    ],
)
def test_an_unlike_worker_is_refused(changes, sentence):
    assert sentence in why(**changes)


@pytest.mark.parametrize(("prefill", "decode"), [(2, 3), (3, 2), (4, 6)])
def test_ranks_of_which_neither_number_divides_the_other_are_refused_whichever_side_has_more(prefill, decode):
    message = Register(**GOOD | {"tp_size": decode})
    reason = rejection(message, PLAN, Ranks(prefill, 0, 12), AuxRows((0, 0), (4, 64)))
    assert f"among {prefill} ranks in prefill, among {decode} in decode, and neither is a multiple" in reason


@pytest.mark.parametrize(
    ("ranks", "decode", "partners"),
    [
        ((4, 1, 8), 8, {2, 3}),
        ((8, 3, 8), 4, {1}),
        ((2, 1, 8), 1, {0}),
        ((4, 3, 2), 4, {3}),  # copies of heads, and equal ranks
        ((8, 1, 2), 2, {0}),
    ],
)
def test_only_the_ranks_that_take_kv_from_here_are_served(ranks, decode, partners):
    aux = AuxRows((0, 0), (4, 64))
    messages = {rank: Register(**GOOD | {"tp_size": decode, "tp_rank": rank}) for rank in range(decode)}
    assert {rank for rank, message in messages.items() if not rejection(message, PLAN, Ranks(*ranks), aux)} == partners
