"""Tasks against transformers and brute force on tiny models: what is shared among plans changes no number."""

import math

import pytest
import torch
from tinypd import BLOCKS, SPARSE, make_oracle, make_plan, text, tiny

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.evaluation import tasks
from pdtrim_deploy.evaluation.measured import Measured
from pdtrim_deploy.evaluation.perplexity import pd_perplexity
from pdtrim_deploy.evaluation.tasks import agreement, choice, perplexity
from pdtrim_deploy.evaluation.tasks.base import Part, Task
from pdtrim_deploy.evaluation.tasks.judge import greedy, judge
from pdtrim_deploy.models.oracle import PDOracle
from pdtrim_deploy.plan import KVSend

RAGGED = [[[5, 6, 7, 8], [9], [10, 11]], [[12, 13], [14, 15, 16], [17]], [[1], [2, 3], [4, 4, 4, 4]]]
CUT = (SPARSE,) * BLOCKS


def ragged_part(prompt=14):
    return Part.of(text(3, prompt), RAGGED, ["a", "b", "a"])


@torch.no_grad()
@pytest.mark.parametrize("family", ["Llama", "Qwen2"])
def test_choices_are_scored_as_by_one_full_forward_each(family):
    model, part = tiny(family), ragged_part()
    oracle = make_oracle(model, make_plan())
    judgement = judge(oracle, oracle.prefill(part.prompts), part.continuations, part.lengths)
    for item, choices in enumerate(RAGGED):
        for place, tokens in enumerate(choices):
            ids = torch.cat((part.prompts[item], torch.tensor(tokens)))
            logits = model(ids[None]).logits[0, 13:-1]
            expected = logits.log_softmax(-1).gather(1, torch.tensor(tokens)[:, None])[:, 0]
            torch.testing.assert_close(judgement.logprobs[item, place, : len(tokens)], expected, atol=1e-4, rtol=0)
            assert (judgement.logprobs[item, place, len(tokens) :] == 0).all()
            assert judgement.top[item, place].tolist() == [*logits.argmax(-1).tolist(), *[-1] * (4 - len(tokens))]


def test_behind_any_plan_choices_are_scored_as_one_by_one():
    plan = make_plan(prefill=(1,), decode=(1, 3), kv=(SPARSE, KVSend(), KVSend(wire_dtype="int8")))
    oracle, part = make_oracle(tiny("Llama"), plan), ragged_part()
    judgement = judge(oracle, oracle.prefill(part.prompts), part.continuations, part.lengths)
    for item, choices in enumerate(RAGGED):
        for place, tokens in enumerate(choices):
            expected = oracle.logprobs(part.prompts[item], torch.tensor(tokens))
            torch.testing.assert_close(judgement.logprobs[item, place, : len(tokens)], expected, atol=1e-4, rtol=0)


def test_branches_keep_to_the_sliding_window():
    for window in (7, 15, 17):
        oracle, part = make_oracle(tiny("Mistral", sliding_window=window), make_plan(kv=CUT)), ragged_part()
        judgement = judge(oracle, oracle.prefill(part.prompts), part.continuations, part.lengths)
        expected = oracle.logprobs(part.prompts[0], torch.tensor(RAGGED[0][0]))
        torch.testing.assert_close(judgement.logprobs[0, 0], expected, atol=1e-4, rtol=0)


def test_choice_accuracy_is_that_of_brute_force():
    part = Part.of(text(40, 14, seed=1), [RAGGED[n % 3] for n in range(40)], ["all"] * 40)
    oracle = make_oracle(tiny("Llama"), make_plan(kv=CUT))
    got = Task("choice", (part,), choice.read).measure([oracle])[0]
    right, normed = [], []
    for item in range(40):
        each = [oracle.logprobs(part.prompts[item], torch.tensor(tokens)) for tokens in RAGGED[item % 3]]
        right.append(float(max(range(3), key=lambda n, each=each: each[n].sum()) == 0))
        normed.append(float(max(range(3), key=lambda n, each=each: each[n].mean()) == 0))
        assert got.values["right_nll"][item] == pytest.approx(-float(each[0].mean()), abs=1e-4)
    assert list(got.values["accuracy"]) == right
    assert list(got.values["accuracy_norm"]) == normed
    assert 0 < sum(right) < 40  # the lists could differ
    assert right != normed


def test_plans_that_share_prefill_get_the_numbers_they_get_alone(monkeypatch):
    part = Part.of(text(9, 14, seed=2), RAGGED * 3, ["x"] * 9)
    monkeypatch.setattr("pdtrim_deploy.evaluation.tasks.base.KV_TOKENS", 14 * 2)  # two items a batch
    dense, ran = make_oracle(tiny("Llama"), make_plan()), []
    rules = [(KVSend(),) * BLOCKS, CUT, (KVSend(wire_dtype="int4"),) * BLOCKS]
    prefill = PDOracle.prefill_parts
    monkeypatch.setattr(PDOracle, "prefill_parts", lambda oracle, parts: ran.extend(parts) or prefill(oracle, parts))
    task = Task("choice", (part,), choice.read)
    shared = task.measure([dense.with_kv(kv) for kv in rules])
    assert len(ran) == 5
    alone = [task.measure([make_oracle(tiny("Llama"), make_plan(kv=kv))])[0] for kv in rules]
    assert shared == alone
    assert len({result.values["right_nll"] for result in shared}) == 3  # each plan does matter


def test_oracles_of_two_prefill_models_are_refused():
    part = ragged_part()
    pair = [make_oracle(tiny("Llama"), make_plan()), make_oracle(tiny("Llama"), make_plan(prefill=(1,), decode=(1,)))]
    with pytest.raises(ValueError, match="do not share their prefill"):
        Task("choice", (part,), choice.read).measure(pair)


def test_a_model_that_gives_no_number_is_reported():
    model = tiny("Llama")
    model.model.norm.weight.data[0] = torch.nan
    with pytest.raises(UserError, match="task choice: right_nll is not a number"):
        Task("choice", (ragged_part(),), choice.read).measure([make_oracle(model, make_plan())])


def test_greedy_side_by_side_is_greedy_one_by_one():
    oracle = make_oracle(tiny("Qwen3"), make_plan(decode=(2,), kv=(SPARSE, KVSend(), SPARSE, KVSend())))
    prompts = text(3, 14)
    assert torch.equal(greedy(oracle, prompts, 9), torch.stack([oracle.greedy(prompt, 9) for prompt in prompts]))


def test_agreement_with_itself_is_whole_and_prefix_is_that_of_a_free_run():
    dense, prompts = make_oracle(tiny("Llama"), make_plan()), text(6, 14, seed=3)
    generated = greedy(dense, prompts, 10)
    task = Task("agreement", (Part.of(prompts, [[row] for row in generated.tolist()], ["14"] * 6),), agreement.read)
    cut = dense.with_kv(CUT)
    same, other = task.measure([dense, cut])
    assert same.values == {"top1": (1.0,) * 6, "prefix": (1.0,) * 6}
    for item, prompt in enumerate(prompts):
        free_run = cut.greedy(prompt, 10)
        shared = int((free_run == generated[item]).long().cumprod(0).sum())
        assert other.values["prefix"][item] == pytest.approx(shared / 10)
        assert other.values["top1"][item] >= other.values["prefix"][item]
    assert other.mean("prefix") < 1


def test_the_perplexity_task_is_pd_perplexity_at_every_length():
    ids = text(5, 40)
    parts = [Part.of(ids[:, 30 - n : 30], [[row] for row in ids[:, 30:].tolist()], [str(n)] * 5) for n in (8, 30)]
    oracle = make_oracle(tiny("Llama"), make_plan(kv=CUT))
    got = Task("perplexity", tuple(parts), perplexity.read).measure([oracle])[0]
    for prompt in (8, 30):
        expected = pd_perplexity(oracle, ids[:, 30 - prompt :], prompt)
        assert got.items("nll", str(prompt)) == pytest.approx(expected.per_sequence, abs=1e-5)
        assert math.exp(got.mean("nll", str(prompt))) == pytest.approx(expected.ppl, rel=1e-5)


def test_pairs_are_compared_item_by_item():
    reference = Measured("t", ("a", "b", "a"), {"nll": (1.0, 5.0, 2.0)})
    result = Measured("t", ("a", "b", "a"), {"nll": (1.5, 5.0, 3.5)})
    paired = result.against(reference, "nll")
    assert paired.mean == pytest.approx(2 / 3)
    assert paired.stderr == pytest.approx(torch.tensor([0.5, 0.0, 1.5]).std().item() / math.sqrt(3))
    assert result.against(reference, "nll", "a").mean == pytest.approx(1.0)
    assert math.isnan(result.against(reference, "nll", "b").stderr)
    assert result.by_group("nll") == {"a": 2.5, "b": 5.0}


def test_a_text_judged_several_times_is_evidence_once():
    none = Measured("t", ("a", "a", "b", "b"), {"nll": (0.0,) * 4}, (0, 1, 0, 1))
    result = Measured("t", ("a", "a", "b", "b"), {"nll": (1.0, 2.0, 3.0, 8.0)}, (0, 1, 0, 1))
    both = result.against(none, "nll")
    assert (both.mean, both.count) == (3.5, 4)
    assert both.stderr == pytest.approx(torch.tensor([2.0, 5.0]).std().item() / math.sqrt(2))
    assert result.against(none, "nll", "a").stderr == pytest.approx(0.5)
    lone = Measured("t", ("a", "b"), {"nll": (1.0, 2.0)}, (0, 0))
    assert math.isnan(lone.against(lone, "nll").stderr)


def test_an_unknown_task_is_refused_with_the_known_ones():
    with pytest.raises(UserError, match="'needles' is no task; use one of perplexity, choice, needle, agreement"):
        tasks.check("needles")
