"""The plan's invariants, each refused with its block named; its arithmetic, by hand; its digest."""

import json

import pytest
from pydantic import ValidationError

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.plan import Distilled, Drop, Keep, KVOnly, KVSend, ModelShape, PDPlan

SHAPE = ModelShape(
    architecture="LlamaForCausalLM", fingerprint="f", num_blocks=6, num_kv_heads=2, head_dim=8, kv_dtype="bfloat16"
)
KEEP, DROP = Keep(), Drop()
PAIR = Distilled(pair=(2, 3), kv_from=2)


def plan(prefill="kkkkkk", decode="kkkkkk", kv=None, **changes):
    actions = {"k": KEEP, "-": DROP, "p": PAIR, "o": KVOnly()}
    stages = [tuple(actions[letter] for letter in letters) for letters in (prefill, decode)]
    layers = sum(letter == "k" for letter in decode) + ("p" in decode)
    return PDPlan(
        **{"model": SHAPE, "prefill": stages[0], "decode": stages[1], "kv": kv or (KVSend(),) * layers} | changes
    )


def test_layers_keep_their_original_names():
    cut = plan(prefill="kk-kkk", decode="-k-kk-")
    assert cut.prefill_layers == (0, 1, 3, 4, 5)
    assert cut.decode_layers == (1, 3, 4)
    assert cut.layer_map == (1, 2, 3)
    assert cut.dropped("decode") == (0, 2, 5)


def test_a_distilled_pair_reads_the_kv_of_its_parent():
    assert plan(decode="kkppkk").layer_map == (0, 1, 2, 4, 5)
    assert plan(prefill="kkppkk", decode="kkppkk").layer_map == (0, 1, 2, 3, 4)


def test_a_block_may_run_in_prefill_for_its_kv_alone():
    cut = plan(prefill="k-okok", decode="k-kkkk")
    assert cut.prefill_layers == cut.decode_layers == (0, 2, 3, 4, 5)
    assert cut.kv_only_layers == (1, 3)
    assert cut.prefill_share == pytest.approx((3 + 0.2) / 6)
    assert cut.layer_map == (0, 1, 2, 3, 4)
    assert plan(prefill="kkokkk", decode="kkppkk").layer_map == (0, 1, 2, 4, 5)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"decode": "kkokkk", "kv": (KVSend(),) * 6}, "block 2 is kv_only in decode; only prefill"),
        ({"prefill": "kkokkk", "decode": "kk-kkk"}, "block 2 is kv_only in prefill but decode does not read its KV"),
        ({"prefill": "kkkokk", "decode": "kkppkk"}, "block 3 is kv_only in prefill but decode does not read its KV"),
        ({"prefill": "k-kkkk"}, "block 1 is dropped in prefill but not in decode"),
        ({"prefill": "kkppkk", "decode": "kk-kkk"}, "decode block 3 has no prefill block"),
        ({"prefill": "kkppkk"}, "decode block 3 has no prefill block"),
        ({"decode": "kkpkkk"}, "block 2: pair .2, 3. is not marked on block 3"),
        ({"decode": "kkppkp"}, "block 5 is marked distilled as pair"),
        ({"prefill": "------", "decode": "------", "kv": (KVSend(),)}, "prefill keeps no block"),
        ({"decode": "kkkkk"}, "decode names 5 blocks, the model has 6"),
        ({"kv": (KVSend(),)}, "kv has 1 entries, decode keeps 6"),
    ],
)
def test_what_breaks_an_invariant_is_named(changes, sentence):
    with pytest.raises(ValidationError, match=sentence):
        plan(**changes)


@pytest.mark.parametrize(
    "values",
    [
        {"mode": "sparse"},
        {"mode": "full", "n_first": 1},
        {"mode": "sparse", "n_first": -1, "n_last": 3},
        {"mode": "sparse", "n_last": 3, "wire_dtype": "int2"},
    ],
)
def test_kv_rules_that_mean_nothing_are_refused(values):
    with pytest.raises(ValidationError):
        KVSend(**values)


def test_pairs_must_be_adjacent():
    with pytest.raises(ValidationError, match="not adjacent"):
        Distilled(pair=(1, 3), kv_from=1)
    with pytest.raises(ValidationError, match="cannot take its KV from block 5"):
        Distilled(pair=(1, 2), kv_from=5)


def test_bytes_by_hand():
    sparse = KVSend(mode="sparse", n_first=4, n_last=16)
    cut = plan(decode="k-kk-k", kv=(KVSend(), sparse, sparse, sparse))
    row = 2 * 8 * 2  # KV heads * head size * bytes of bfloat16
    assert cut.payload_bytes(100) == 2 * row * (100 + 3 * 20)
    assert cut.payload_bytes(7) == 2 * row * 4 * 7
    assert cut.dense_bytes(100) == 2 * row * 6 * 100
    assert cut.reduction(100) == pytest.approx(600 / 160)
    assert sparse.row_ranges(100) == ((0, 4), (84, 100))
    assert KVSend(mode="sparse", n_last=3).row_ranges(10) == ((7, 10),)


def test_the_digest_is_of_the_content():
    assert plan().digest == plan().digest == PDPlan.dense(SHAPE).digest
    assert plan(decode="kkkkk-").digest != plan().digest
    whole = plan()
    assert whole.with_kv((KVSend(mode="sparse", n_last=1),) * 6).digest != whole.digest


def test_json_and_back(tmp_path):
    file = tmp_path / "plan.json"
    file.write_text(plan(decode="kkppkk").canonical_json())
    assert PDPlan.load(file) == plan(decode="kkppkk")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (None, "no such plan"),
        ("{", "not JSON"),
        (b"\xff", "not JSON .*; build the bundle again"),
        ("[" * 100_000, "not JSON .*; build the bundle again"),
        ("{}", "not a valid plan: model: Field required"),
        (json.dumps({**json.loads(plan().canonical_json()), "more": 1}), "not a valid plan: more"),
    ],
    ids=["gone", "half", "no-text", "no-end", "empty", "more"],
)
def test_a_bad_file_is_one_sentence(tmp_path, text, sentence):
    file = tmp_path / "plan.json"
    if text is not None:
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=sentence):
        PDPlan.load(file)
