"""Experts in the plan: what breaks an invariant is named; plans that keep all experts have the digests they had."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from pdtrim_deploy.plan import BlockExperts, Drop, ExpertShape, Keep, KeptExperts, KVSend, ModelShape, PDPlan

SHAPE = ModelShape(
    architecture="Glm4MoeForCausalLM", fingerprint="f", num_blocks=4, num_kv_heads=2, head_dim=8, kv_dtype="bfloat16"
)
EXPERTS = ExpertShape(count=8, top_k=2, first_block=1)
GROUPED = ExpertShape(count=8, top_k=4, groups=2, top_groups=1)


def entries(kept):
    return tuple(BlockExperts(block=block, kept=numbers) for block, numbers in kept.items())


def plan(prefill=None, decode=None, shape=EXPERTS):
    """Decode drops block 2; block 0 is dense where the shape says so."""
    return PDPlan(
        model=SHAPE,
        prefill=(Keep(),) * 4,
        decode=(Keep(), Keep(), Drop(), Keep()),
        kv=(KVSend(),) * 3,
        experts=KeptExperts(shape=shape, prefill=entries(prefill or {}), decode=entries(decode or {})),
    )


def test_each_stage_has_its_own_sets():
    both = plan({1: (0, 1, 2), 2: (0, 1, 7), 3: (2, 3, 4)}, {1: (0, 5), 3: (6, 7)})
    assert both.kept_experts("prefill") == {1: (0, 1, 2), 2: (0, 1, 7), 3: (2, 3, 4)}
    assert both.kept_experts("decode") == {1: (0, 5), 3: (6, 7)}
    assert (both.experts.count("prefill"), both.experts.count("decode")) == (3, 2)
    alone = plan(decode={1: (0, 5), 3: (6, 7)})
    assert alone.kept_experts("prefill") == {}
    assert alone.experts.count("prefill") == 8
    assert alone.with_kv(alone.kv).experts == alone.experts
    assert len({plan.digest for plan in (both, alone, alone.with_parts(experts=None))}) == 3
    assert PDPlan.parse(both.model_dump(mode="json"), "here") == both


def test_a_plan_that_keeps_all_reads_as_before_there_were_others():
    assert "experts" not in PDPlan.dense(SHAPE).canonical_json()


@pytest.mark.parametrize(
    ("stages", "sentence"),
    [
        ({}, "experts names neither stage"),
        ({"decode": {1: (0, 5)}}, r"decode names experts of blocks \[1\], but runs blocks with experts \[1, 3\]"),
        ({"decode": {0: (0, 5), 1: (0, 5), 3: (0, 5)}}, r"blocks \[0, 1, 3\], but runs blocks with experts \[1, 3\]"),
        ({"decode": {1: (0, 5), 2: (0, 5), 3: (0, 5)}}, r"blocks \[1, 2, 3\], but runs"),
        ({"decode": {3: (0, 5), 1: (0, 5)}}, r"blocks \[3, 1\], but runs"),
        ({"decode": {1: (0, 5), 3: (0, 5, 6)}}, "decode keeps 2 experts in some blocks and 3 in others"),
        ({"decode": {1: (0,), 3: (1,)}}, "block 1: 1 experts are kept; allowed: 2 to 8"),
        ({"decode": {1: (0, 8), 3: (1, 2)}}, "block 1 has experts 0 to 7, not 8"),
        ({"decode": {1: (5, 0), 3: (1, 2)}}, r"block 1: experts must ascend, not \[5, 0\]"),
        ({"decode": {1: (5, 5), 3: (1, 2)}}, r"block 1: experts must ascend, not \[5, 5\]"),
    ],
)
def test_what_breaks_an_invariant_is_named(stages, sentence):
    with pytest.raises(ValidationError, match=sentence):
        plan(**stages)


def test_groups_of_a_router_lose_as_many_experts_each():
    """Its groups are equal parts of the numbers; a token needs its four experts within a group."""
    fair = dict.fromkeys((0, 1, 3), (0, 1, 2, 3, 4, 5, 6, 7))
    plan(decode=fair, shape=GROUPED)
    with pytest.raises(ValidationError, match="7 experts are kept; allowed: 8 to 8"):
        plan(decode=dict.fromkeys((0, 1, 3), (0, 1, 2, 3, 4, 5, 6)), shape=GROUPED)
    two = ExpertShape(count=8, top_k=2, groups=2, top_groups=2)
    assert two.smallest() == 4  # groups are ranked by their best two
    plan(decode=dict.fromkeys((0, 1, 3), (0, 3, 5, 6)), shape=two)
    with pytest.raises(ValidationError, match="5 experts are kept; allowed: a multiple of the router's 2 groups"):
        plan(decode=dict.fromkeys((0, 1, 3), (0, 1, 2, 4, 5)), shape=two)
    with pytest.raises(ValidationError, match="group 0 keeps 3 experts; each of 2 groups must keep 2"):
        plan(decode=dict.fromkeys((0, 1, 3), (0, 1, 2, 4)), shape=two)
