import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.pipeline.stand_in import caveat, fixed_rules, stand_in
from pdtrim_deploy.plan import Drop, Keep, KVSend, ModelShape, PDPlan
from pdtrim_deploy.plan.blocks import KV_ONLY_SHARE
from pdtrim_deploy.recipe import PruningSection, Recipe
from pdtrim_deploy.recipe.healing import HealingSection
from pdtrim_deploy.recipe.kv import KVSection

SHAPE = ModelShape(architecture="X", fingerprint="f", num_blocks=32, num_kv_heads=8, head_dim=128, kv_dtype="bfloat16")
CUT = KVSend(mode="sparse", n_first=4, n_last=64)


def plan_of(kv, decode_blocks=0):
    recipe = Recipe(name="a", model={"source": "pypi:x"}, kv=kv, pruning=PruningSection(decode_blocks=decode_blocks))
    return stand_in(recipe, SHAPE)


@settings(max_examples=25)  # the solver takes 0.2 s each
@given(st.floats(1.01, 20), st.integers(0, 20))
def test_a_byte_budget_is_kept_and_used(reduction, decode_blocks):
    kv = KVSection(method="budget", reduction=reduction, prompt_tokens=512)
    plan = plan_of(kv, decode_blocks)
    assert plan.reduction(512) >= reduction
    largest_step = plan.dense_bytes(512) / 32
    if plan.kv != (KVSend(),) * len(plan.kv):
        assert plan.payload_bytes(512) > plan.dense_bytes(512) / reduction - largest_step
    assert f"{plan.reduction(512):.2f}x at 512" in caveat(kv, plan)


def test_a_budget_that_nothing_fits_is_refused():
    kv = KVSection(
        method="budget", reduction=9.0, prompt_tokens=512, sparse_choices=((4, 60),), wire_choices=("native",)
    )
    with pytest.raises(UserError, match=r"kv.reduction is 9 but the smallest options give at most 8.00x at 512 prompt"):
        plan_of(kv)


def test_sublayers_that_go_have_no_kv_and_their_share_of_the_work():
    pruning = PruningSection(
        prefill_blocks=1, decode_blocks=2, prefill_attentions=1, decode_attentions=5, prefill_mlps=2, decode_mlps=3
    )
    plan = stand_in(Recipe(name="a", model={"source": "pypi:x"}, pruning=pruning), SHAPE)
    assert sorted(plan.missing("prefill").values()) == ["attention", "mlp", "mlp"]
    assert sorted(plan.missing("decode").values()) == ["attention"] * 5 + ["mlp"] * 3
    assert plan.payload_bytes(100) * 32 == plan.dense_bytes(100) * 25
    assert plan.prefill_share(512) == pytest.approx((31 - 0.2 - 2 * 0.8) / 32)
    assert plan.decode_share == pytest.approx((30 - 5 * 0.2 - 3 * 0.8) / 32)


@pytest.mark.parametrize("tail", [0, 64])
def test_kv_only_blocks_have_their_share_of_the_work_and_tails_theirs(tail):
    pruning = PruningSection(prefill_blocks=1, decode_blocks=2, prefill_attentions=1, decode_attentions=5)
    healing = HealingSection(kv_only_blocks=8, kv_only_tail=tail)
    recipe = Recipe(name="a", model={"source": "pypi:x"}, pruning=pruning, healing=healing)
    plan = stand_in(recipe, SHAPE)
    assert len(plan.kv_only_layers) == 8
    assert plan.kv_only_tail == tail
    spared = 8 * (1 - KV_ONLY_SHARE)
    for tokens in (32, 64, 512, 8192):
        part = 1 - min(1, tail / tokens)
        assert plan.prefill_share(tokens) == pytest.approx((31 - 0.2 - spared * part) / 32)
    assert plan.decode_share == pytest.approx((30 - 5 * 0.2) / 32)


@pytest.mark.parametrize(
    ("kv", "cut", "says"),
    [
        (KVSection(), 0, "0 of 30 decode layers are sparse"),
        (KVSection(method="all", n_first=4, n_last=64), 30, "30 of 30"),
        (KVSection(method="measured-harm", sparse_layers=9, n_first=4, n_last=64), 9, "9 of 30"),
        (KVSection(method="attention-mass", threshold=0.5, n_first=4, n_last=64), 0, "known only once it is built"),
        (KVSection(method="budget", max_loss=0.01), 0, "known only once it is built"),
    ],
)
def test_counts_that_are_known_are_shown_and_others_bounded(kv, cut, says):
    plan = plan_of(kv, 2)
    assert [send for send in plan.kv if send != KVSend()] == [CUT] * cut
    assert says in caveat(kv, plan)


# As Gemma-3-270M: of 18 blocks, 5, 11 and 17 attend to all tokens.
WINDOWS = tuple(None if block % 6 == 5 else 512 for block in range(18))
WINDOWED = ModelShape(
    architecture="X", fingerprint="f", num_blocks=18, num_kv_heads=1, head_dim=256, kv_dtype="bfloat16", windows=WINDOWS
)


def windowed_plan(decode_blocks, **kv):
    pruning = PruningSection(prefill_blocks=decode_blocks // 2, decode_blocks=decode_blocks)
    recipe = Recipe(name="a", model={"source": "pypi:x"}, kv=KVSection(**kv), pruning=pruning)
    return stand_in(recipe, WINDOWED)


def without(gone):
    decode = tuple(Drop() if block in gone else Keep() for block in range(18))
    return PDPlan.uncut(WINDOWED, (Keep(),) * 18, decode)


@pytest.mark.parametrize("gone", [(), (0,), (3,), (5,), (17,), (1, 2, 3, 4, 6, 7)])
def test_whatever_blocks_go_all_cuts_each_layer_that_attends_to_all_tokens(gone):
    plan = without(gone)
    plan = plan.with_kv(fixed_rules(KVSection(method="all", n_first=4, n_last=60), len(plan.kv)))
    modes = {block: send.mode for block, send in zip(plan.decode_kv_blocks, plan.kv, strict=True)}
    assert modes == {block: "window" if WINDOWS[block] else "sparse" for block in range(18) if block not in gone}


@pytest.mark.parametrize(("decode_blocks", "most"), [(0, 3), (1, 3), (15, 3), (16, 2)])
def test_as_many_layers_may_be_cut_as_any_choice_of_blocks_leaves(decode_blocks, most):
    sizes = {"method": "measured-harm", "n_first": 4, "n_last": 60}
    plan = windowed_plan(decode_blocks, sparse_layers=most, **sizes)
    assert [send.mode for send in plan.kv].count("sparse") == most
    with pytest.raises(UserError, match=rf"at most {most} of decode's layers attend to all tokens"):
        windowed_plan(decode_blocks, sparse_layers=most + 1, **sizes)


@pytest.mark.parametrize("last", [252, 1020])  # rows of a cut layer: fewer than a window has, and more
@pytest.mark.parametrize("gone", [(5,), (5, 11), (5, 11, 17), (0, 1, 2)])
def test_a_budget_is_refused_only_where_no_choice_of_blocks_fits_it(gone, last):
    plan = without(gone)
    least = plan.with_kv((KVSend(mode="sparse", n_first=4, n_last=last, wire_dtype="int4"),) * len(plan.kv))
    kv = {"method": "budget", "sparse_choices": ((4, last),), "wire_choices": ("int8", "int4"), "prompt_tokens": 4096}
    windowed_plan(len(gone), reduction=least.reduction(4096) - 1e-6, **kv)
    with pytest.raises(UserError, match=r"kv.reduction is 30 but the smallest options give at most"):
        windowed_plan(len(gone), reduction=30.0, **kv)
