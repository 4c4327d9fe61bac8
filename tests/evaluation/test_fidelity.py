"""The judge of served logprobs: it passes right programs, whatever the wire dtype, and no wrong one."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from stagepairs import pair_of
from tinypd import BLOCKS, DIM, biased, make_oracle, make_plan, text, tiny

from pdtrim_deploy.evaluation.fidelity import check, sensitivity
from pdtrim_deploy.evaluation.fidelity.cases import Group, groups, text_needed
from pdtrim_deploy.evaluation.fidelity.check import FidelityResult, judge
from pdtrim_deploy.evaluation.fidelity.client import Served
from pdtrim_deploy.evaluation.fidelity.controls import WrongScales, controls, wrong_oracles
from pdtrim_deploy.kvchoice.offsets import measure
from pdtrim_deploy.models.oracle import PDOracle, PrefillState
from pdtrim_deploy.plan import Drop, Keep, KVOnly, KVSend, WithoutAttention
from pdtrim_deploy.plan.wire import WIRE_DTYPES

GROUP = Group("g", "in turn", ())
DROPPED = (3,)
LENGTHS = (5, 130, 140, 150, 133)


def sparse(wire, first=3, last=9):
    return KVSend(mode="sparse", n_first=first, n_last=last, wire_dtype=wire)


def share(wire, first, last, share):
    return sparse(wire, first, last).model_copy(update={"share": share})


MIXED = (sparse("int4", 4, 12), KVSend(wire_dtype="int8"), sparse("fp8", 0, 20), sparse("native", 3, 7))
PLANS = {
    wire: (sparse(wire),) * 2 + (KVSend(wire_dtype=wire), sparse(wire))
    for wire in WIRE_DTYPES
    if KVSend(wire_dtype=wire).suits(DIM)
} | {
    "mixed": MIXED,
    "shares": (share("int4", 2, 4, 100), KVSend(wire_dtype="int8"), share("native", 0, 3, 77), sparse("native", 3, 7)),
    "dense int8": (KVSend(wire_dtype="int8"),) * (BLOCKS - 1),
}


@pytest.fixture(scope="module")
def model():
    return tiny("Llama")


def oracle_of(model, kv):
    return make_oracle(model, make_plan(decode=DROPPED, kv=kv))


def serve(oracle, kv=None, noise=3e-7):
    """What a server answers that follows the rules `kv` and whose prompt KV is the oracle's but for rounding."""
    by, generator = oracle.with_kv(kv) if kv else oracle, torch.Generator().manual_seed(99)
    served = []
    for seed, length in enumerate(LENGTHS):
        prompt, tokens = text(1, length, seed), text(1, 8, 50 + seed)
        state = oracle.prefill(prompt)
        keys, values = (
            tuple(pool * (1 + noise * torch.randn(pool.shape, generator=generator)) for pool in side)
            for side in (state.keys, state.values)
        )
        logprobs = by.score(PrefillState(1, length, keys, values, state.logits), tokens)[0]
        served.append(
            (GROUP, Served(tuple(prompt[0].tolist()), tuple(tokens[0].tolist()), tuple(logprobs.tolist()), 0))
        )
    return served


@pytest.mark.parametrize("kv", PLANS.values(), ids=PLANS)
def test_a_right_server_passes_and_every_wrong_plan_is_told_apart(model, kv):
    oracle = oracle_of(model, kv)
    result = judge(oracle, serve(oracle))
    assert result.passed, result.problems
    assert result.requests == len(LENGTHS)
    assert result.error.worst > 0
    assert set(result.controls_detected) == set(controls(oracle.plan, 129))
    assert all(result.controls_detected.values())


@pytest.mark.parametrize("kv", PLANS.values(), ids=PLANS)
def test_a_server_with_a_wrong_plan_fails(model, kv):
    oracle = oracle_of(model, kv)
    for name, wrong in controls(oracle.plan, min(LENGTHS)).items():
        result = judge(oracle, serve(oracle, wrong))
        assert not result.passed, name
        assert any("prompt is off by" in problem for problem in result.problems), name


def test_a_server_without_key_offsets_or_with_scales_left_in_is_told_apart():
    model = biased()
    oracle = make_oracle(model, make_plan())
    oracle = oracle.with_offsets(measure(oracle, text(8, 48), lambda _: None).offsets)
    oracle = oracle.with_kv((KVSend(wire_dtype="int4"),) * BLOCKS)
    right = judge(oracle, serve(oracle))
    assert right.passed, right.problems
    assert {"no key offsets", "key scales left in"} <= right.controls_detected.keys()
    assert right.controls_detected.keys() == wrong_oracles(oracle, 129).keys()
    for server in (oracle.with_offsets(None), WrongScales(oracle)):
        wrong = judge(oracle, serve(server))
        assert any("prompt is off by" in problem for problem in wrong.problems)


@pytest.mark.parametrize(("last", "named"), [(Keep(), {"tail - 1"}), (WithoutAttention(), set()), (Drop(), set())])
def test_a_tail_of_one_token_has_no_shorter_one_where_it_alone_reads_some_k_and_v(model, last, named):
    plan = make_plan((), ())
    kv = plan.kv if last.kind == "keep" else plan.kv[1:]
    plan = plan.with_parts(
        prefill=(*plan.prefill[:-1], KVOnly()), decode=(*plan.decode[:-1], last), kv=kv, kv_only_tail=1
    )
    pair = replace(pair_of(model, (), ()), plan=plan)
    oracle = PDOracle(pair.stage("prefill"), pair.stage("decode"), plan)
    assert {name for name in wrong_oracles(oracle, 129) if "tail" in name} == named


def test_what_is_allowed_follows_what_rounding_does(model, monkeypatch):
    oracle = oracle_of(model, PLANS["native"])
    assert judge(oracle, serve(oracle)).allowed == check.Size(1e-3, 2.5e-4)
    monkeypatch.setitem(sensitivity.NOISE, "float32", 1e-2)
    result = judge(oracle, serve(oracle))
    assert result.sensitivity.worst > result.sensitivity.typical > 1e-3
    assert result.allowed.worst == check.FACTOR * result.sensitivity.worst
    assert result.allowed.typical == check.FACTOR * result.sensitivity.typical


def test_a_tolerance_so_high_that_it_proves_nothing_fails_with_a_sentence(model, monkeypatch):
    monkeypatch.setattr(check, "FACTOR", 1e6)
    oracle = oracle_of(model, PLANS["int4"])
    result = judge(oracle, serve(oracle))
    assert not result.passed
    assert result.error.worst <= result.allowed.worst
    assert "the check is blind to the wrong plan 'n_last - 1': it differs by 0.0 times" in "\n".join(result.problems)


def test_an_answer_that_is_not_a_number_fails(model):
    oracle = oracle_of(model, PLANS["native"])
    (group, first), *others = serve(oracle)
    broken = Served(first.prompt, first.tokens, (*first.logprobs[:-1], float("nan")), 0)
    result = judge(oracle, [*others, (group, broken)])
    assert not result.passed
    assert any("the worst prompt is off by nan" in problem for problem in result.problems)


def off_by(served, prompts, nats):
    """The same answers, those to the first `prompts` prompts a little off."""
    wrong = [
        (group, Served(answer.prompt, answer.tokens, tuple(x + nats for x in answer.logprobs), 0))
        for group, answer in served[:prompts]
    ]
    return [*wrong, *served[prompts:]]


@pytest.mark.parametrize(("prompts", "tips", "passes"), [(1, True, True), (1, False, False), (2, True, False)])
def test_what_rounding_does_seldom_is_looked_for_where_one_prompt_is_off(model, monkeypatch, prompts, tips, passes):
    """A code that tips over in one of many draws; what no draw explains, and what befalls many prompts, is wrong."""
    oracle, plain, seeds = oracle_of(model, PLANS["native"]), check.score_shaken, []
    served = off_by(serve(oracle), prompts, 4e-3)

    def shaken(oracle, state, tokens, seed):
        right, others = plain(oracle, state, tokens, seed)
        seeds.append(seed)
        rare = tips and seed == len(served) + 5
        return right, others + 2e-3 * rare

    monkeypatch.setattr(check, "score_shaken", shaken)
    result = judge(oracle, served)
    problems = [problem for problem in result.problems if "worst prompt is off" in problem]
    assert (not problems) == passes
    assert len(seeds) == len(served) + check.AGAIN * (prompts == 1)
    assert result.sensitivity.worst == pytest.approx(2e-3 if passes else 0, abs=4e-4)


def test_no_prompt_is_excused_by_what_rounding_does_to_another(model, monkeypatch):
    oracle, plain = oracle_of(model, PLANS["native"]), check.score_shaken
    served = off_by(serve(oracle), 2, 4e-3)
    first = served[0][1].prompt

    def shaken(oracle, state, tokens, seed):
        right, others = plain(oracle, state, tokens, seed)
        return right, others + 2e-3 * (seed >= len(served) and state.tokens == len(first))

    monkeypatch.setattr(check, "FEW", 1)
    monkeypatch.setattr(check, "score_shaken", shaken)
    assert any("worst prompt is off" in problem for problem in judge(oracle, served).problems)


def test_controls_of_mixed_sizes():
    plan = make_plan(decode=DROPPED, kv=MIXED)
    rules = controls(plan, 200)
    assert [(s.n_first, s.n_last) for s in rules["n_first - 1"]] == [(3, 12), (0, 0), (0, 20), (2, 7)]
    assert [(s.n_first, s.n_last) for s in rules["n_last - 1"]] == [(4, 11), (0, 0), (0, 19), (3, 6)]
    assert all(send.wire_dtype == "native" for send in rules["native on the wire"])
    assert rules["rules one layer off"] == (MIXED[-1], *MIXED[:-1])
    assert len(rules) == 5  # and, where there are any, the plan without its key offsets
    for page in ("tutorial.md", "explanation/oracle.md"):
        assert "up to seven" in (Path(__file__).parents[2] / "docs" / page).read_text()
    uniform = make_plan(kv=(KVSend(),) * BLOCKS)
    assert set(controls(uniform, 200)) == {"first row missing", "last row missing"}


def test_controls_of_shares_are_a_row_off_at_every_length():
    kv = (share("int4", 2, 4, 100), KVSend(), share("native", 0, 3, 77), sparse("native", 3, 7))
    plan = make_plan(decode=DROPPED, kv=kv)
    for tokens in (129, 130, 1000):
        rules, right = controls(plan, tokens), [send.rows(tokens) for send in kv]
        assert set(rules) == {
            "dense plan", "n_first - 1", "n_last - 1", "share + 1 row", "native on the wire", "rules one layer off"
        }  # fmt: skip
        rows = {name: [send.rows(tokens) for send in wrong] for name, wrong in rules.items()}
        assert rows["n_last - 1"] == [right[0] - 1, tokens, right[2] - 1, right[3] - 1]
        assert rows["share + 1 row"] == [right[0] + 1, tokens, right[2] + 1, right[3]]
        assert all(
            wrong.edges(tokens)[0] == send.n_first for wrong, send in zip(rules["share + 1 row"], kv, strict=True)
        )


def test_prompts_are_tried_where_a_share_begins_to_be_more_than_the_least():
    plan = make_plan(kv=(KVSend(),) * 3 + (share("int4", 2, 4, 30), sparse("native", 4, 12)))
    tokens = 6 * 1024 // 30
    assert plan.kv[3].rows(tokens) == 6 < plan.kv[3].rows(tokens + 1)
    count, length = text_needed(plan)
    edges = groups(plan, [[0] * length] * count)[0]
    assert sorted(map(len, edges.prompts)) == [1, 2, 15, 16, 17, tokens, tokens + 1]


def test_json_holds_the_verdict_and_what_it_rests_on(model):
    oracle = oracle_of(model, PLANS["fp8"])
    result = judge(oracle, serve(oracle))
    data = result.to_json()
    assert isinstance(result, FidelityResult)
    assert data["passed"] is True
    assert data["allowed"] == {"worst": result.allowed.worst, "typical": result.allowed.typical}
    assert data["sensitivity"]["worst"] == max(row["sensitivity"] for row in data["rows"])
    assert data["noise"] == 2.0**-20
    assert data["control_sizes"].keys() == data["controls"].keys()
