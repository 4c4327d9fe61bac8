"""The plan's invariants, each refused with its block named; its arithmetic, by hand; its digest."""

import json

import pytest
from pydantic import ValidationError

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.plan import (
    Distilled,
    Drop,
    Keep,
    KeyOffsetsFile,
    KVOnly,
    KVSend,
    ModelShape,
    PDPlan,
    WithoutAttention,
    WithoutMLP,
)

SHAPE = ModelShape(
    architecture="LlamaForCausalLM", fingerprint="f", num_blocks=6, num_kv_heads=2, head_dim=8, kv_dtype="bfloat16"
)
KEEP, DROP = Keep(), Drop()
PAIR = Distilled(pair=(2, 3), kv_from=2)


def plan(prefill="kkkkkk", decode="kkkkkk", kv=None, **changes):
    actions = {"k": KEEP, "-": DROP, "p": PAIR, "o": KVOnly(), "m": WithoutAttention(), "a": WithoutMLP()}
    stages = [tuple(actions[letter] for letter in letters) for letters in (prefill, decode)]
    layers = sum(letter in "ka" for letter in decode) + ("p" in decode)
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
    assert cut.prefill_share(512) == pytest.approx((3 + 0.2) / 6)
    assert cut.layer_map == (0, 1, 2, 3, 4)
    assert plan(prefill="kkokkk", decode="kkppkk").layer_map == (0, 1, 2, 4, 5)


def test_a_tail_is_work_of_its_blocks_and_in_the_digest():
    plain = plan(prefill="k-kkoo", decode="k-kkkk")
    cut = plain.with_parts(kv_only_tail=64)
    assert cut.kv_only_blocks == (4, 5)
    assert [cut.prefill_share(tokens) for tokens in (1, 64, 128, 640)] == pytest.approx(
        [5 / 6, 5 / 6, (5 - 1.8 / 2) / 6, (5 - 1.8 * 0.9) / 6]
    )
    assert plain.prefill_share(64) == plain.prefill_share(640)
    assert "kv_only_tail" not in plain.canonical_json()
    assert cut.digest != plain.digest
    assert PDPlan.parse(json.loads(cut.canonical_json()), "x") == cut
    with pytest.raises(ValueError, match="kv_only_tail is 64 but prefill runs no block for its K and V alone"):
        plan().with_parts(kv_only_tail=64)


def test_with_a_tail_the_last_blocks_of_prefill_are_kv_only():
    """Others of its tokens end before them, with K and V of blocks too that decode has lost."""
    with pytest.raises(ValueError, match="kv_only_tail is 8 but prefill runs block 3 behind a kv_only one"):
        plan(prefill="k-okko", decode="k-kkkk").with_parts(kv_only_tail=8)
    with pytest.raises(ValueError, match="kv_only_tail is 8 but prefill runs no block whole for other tokens"):
        plan(prefill="o-oooo", decode="k-kkkk").with_parts(kv_only_tail=8)
    unread = plan(prefill="kkkkkk", decode="kkkk-k")
    actions = (*unread.prefill[:4], KVOnly(), KVOnly())
    assert unread.with_parts(prefill=actions, kv_only_tail=8).layer_map == (0, 1, 2, 3, 5)
    with pytest.raises(ValueError, match="block 4 is kv_only in prefill but decode does not read its KV"):
        unread.with_parts(prefill=actions)
    assert plan(prefill="kkkakk", decode="kkkakk").last_whole_blocks == (4, 5)
    assert unread.last_whole_blocks == (1, 2, 3, 4, 5)


def test_a_block_without_attention_needs_no_kv_and_no_prefill_block():
    """Letters: `m` runs the MLP alone, `a` the attention alone."""
    cut = plan(prefill="km-koa", decode="mmmaka")
    assert cut.prefill_layers == (0, 1, 3, 4, 5)
    assert cut.prefill_kv_blocks == (0, 3, 4, 5)
    assert cut.decode_layers == (0, 1, 2, 3, 4, 5)
    assert cut.decode_kv_blocks == (3, 4, 5)
    assert cut.layer_map == (1, 2, 3)
    assert cut.kv_sources == (None, None, None, 2, 3, 4)
    assert cut.missing("decode") == {0: "attention", 1: "attention", 2: "attention", 3: "mlp", 5: "mlp"}
    assert cut.payload_bytes(10) * 2 == cut.dense_bytes(10)
    assert PDPlan.parse(json.loads(cut.canonical_json()), "x") == cut


def test_a_plan_of_whole_blocks_names_no_sublayer():
    """Its JSON, and so its digest, are those of 0.4."""
    text = plan(prefill="kk-oka", decode="kk-kka").canonical_json()
    assert "without_mlp" in text
    assert plan(prefill="kk-oka", decode="kk-kka").kv_sources == (0, 1, 2, 3, 4)
    assert "without" not in plan(prefill="kk-okk", decode="kk-kkk").canonical_json()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"prefill": "kkmkkk"}, "block 2 runs without attention in prefill, which so makes no KV of it"),
        ({"prefill": "kkmkkk", "decode": "kkakkk"}, "block 2 runs without attention in prefill"),
        ({"prefill": "kkmkkk", "decode": "kkppkk"}, "block 2 runs without attention in prefill"),
        ({"prefill": "kk-kkk", "decode": "kkakkk"}, "block 2 is dropped in prefill but not in decode"),
        ({"prefill": "kkokkk", "decode": "kkmkkk"}, "block 2 is kv_only in prefill but decode does not read its KV"),
        ({"decode": "mmmmmm", "kv": (KVSend(),)}, "decode keeps no attention"),
        ({"decode": "kkmkkk", "kv": (KVSend(),) * 6}, "kv has 6 entries, decode keeps 5 layers with attention"),
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
    full = plan()
    assert full.with_kv((KVSend(mode="sparse", n_last=1),) * 6).digest != full.digest


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


OLD = plan(
    prefill="kk-kkk",
    decode="-k-kk-",
    kv=(KVSend(), KVSend(mode="sparse", n_first=2, n_last=8, wire_dtype="int4"), KVSend(wire_dtype="int8")),
)
OFFSETS = KeyOffsetsFile(sha256="0123456789abcdef" * 4, layers=(0, 2))


def test_a_plan_without_key_offsets_reads_as_before_there_were_any():
    assert OLD.digest == "2a756f2e7aa34728c552466bed84e66b6622e2eeb181f69bb856fb34a191ee7c"
    assert "key_offsets" not in OLD.model_dump(mode="json")
    assert PDPlan.parse(OLD.model_dump(mode="json"), "x") == OLD


def test_key_offsets_are_part_of_the_plan():
    with_offsets = OLD.with_key_offsets(OFFSETS)
    assert PDPlan.parse(json.loads(with_offsets.canonical_json()), "x") == with_offsets
    other = OFFSETS.model_copy(update={"sha256": "f" * 64})
    assert len({p.digest for p in (OLD, with_offsets, OLD.with_key_offsets(other))}) == 3
    assert [with_offsets.has_key_offset(layer) for layer in range(3)] == [False, False, True]  # layer 0 travels native
    assert with_offsets.with_kv((KVSend(wire_dtype="fp8"),) * 3).key_offsets == OFFSETS
    assert with_offsets.with_key_offsets(None) == OLD


def test_key_scales_are_part_of_the_plan_and_absent_where_there_are_none():
    """Versions that know none refuse the plan for a key that they do not know."""
    scaled = OLD.with_key_offsets(OFFSETS.model_copy(update={"scaled": True}))
    assert PDPlan.parse(json.loads(scaled.canonical_json()), "x") == scaled
    assert scaled.digest != OLD.with_key_offsets(OFFSETS).digest
    assert list(OLD.with_key_offsets(OFFSETS).model_dump(mode="json")["key_offsets"]) == ["sha256", "layers"]
    assert (scaled.key_offsets.form, OFFSETS.form) == ("keys less their mean, scaled", "keys less their mean")


@pytest.mark.parametrize(
    ("entry", "sentence"),
    [
        ({"layers": (0, 3)}, "key_offsets names layer 3, decode has layers 0 to 2"),
        ({"layers": (2, 1)}, "must ascend"),
        ({"layers": (1, 1)}, "must ascend"),
        ({"layers": ()}, "at least 1 item"),
        ({"sha256": "0" * 63}, "match pattern"),
    ],
)
def test_key_offsets_that_cannot_be_are_refused(entry, sentence):
    data = OLD.model_dump(mode="json") | {"key_offsets": OFFSETS.model_dump() | entry}
    with pytest.raises(UserError, match=sentence):
        PDPlan.parse(data, "x")


def test_equal_plans_are_one_key() -> None:
    plan = PDPlan.dense(SHAPE)
    other = PDPlan.parse(json.loads(plan.canonical_json()), "here")
    assert other is not plan
    assert {plan: 1}[other] == 1
    assert hash(plan) != hash(plan.with_kv((KVSend(wire_dtype="int8"),) * len(plan.kv)))


def test_one_model_runs_the_same_blocks_in_both_stages():
    pair = plan(prefill="k-kkmk", decode="k-kkmk", kv=(KVSend(),) * 4)
    unified = pair.with_parts(unified=True)
    assert (pair.checkpoints, pair.folder("decode")) == ({"prefill": "prefill", "decode": "decode"}, "decode")
    assert (unified.checkpoints, unified.folder("decode")) == ({"model": "prefill"}, "model")
    assert "unified" not in pair.model_dump(mode="json")
    assert unified.digest != pair.digest
    assert PDPlan.parse(json.loads(unified.canonical_json()), "here") == unified


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"decode": "kk-kkk"}, "block 2 is keep in prefill and drop in decode of one model"),
        ({"prefill": "kkkokk", "decode": "kkkkkk"}, "block 3 is kv_only in prefill and keep in decode of one model"),
        ({"kv": (KVSend(), KVSend(mode="sparse", n_last=4), *[KVSend()] * 4)}, "block 1: KV is cut or quantised"),
        ({"kv": (*[KVSend()] * 5, KVSend(wire_dtype="int8"))}, "block 5: KV is cut or quantised"),
        ({"key_offsets": KeyOffsetsFile(sha256="0" * 64, layers=(0,))}, "key_offsets are of keys on a wire"),
    ],
)
def test_what_takes_two_models_is_refused(changes, says):
    with pytest.raises(ValidationError, match=says):
        plan(**changes, unified=True)
