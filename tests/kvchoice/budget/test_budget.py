import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from tinypd import make_oracle, make_plan, text, tiny

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.kvchoice import Problem
from pdtrim_deploy.kvchoice.budget.effects import Measure
from pdtrim_deploy.kvchoice.budget.probe import Probe
from pdtrim_deploy.kvchoice.budget.prompt_kv import PromptKV
from pdtrim_deploy.kvchoice.budget.search import BudgetSearch
from pdtrim_deploy.kvchoice.by_harm import ByBudget, budget_search
from pdtrim_deploy.plan import Keep, KVSend, PDPlan, WithoutAttention, WithoutMLP

PROMPT = 20
ROWS = [KVSend(), *(KVSend(mode="sparse", n_first=1, n_last=n) for n in (2, 9, 18))]
OPTIONS = tuple(row.model_copy(update={"wire_dtype": wire}) for row in ROWS for wire in ("native", "int8", "int4"))
DENSE = (KVSend(),) * 4


def quiet(_):
    pass


def make_problem(family="Llama"):
    return Problem(make_oracle(tiny(family), make_plan(decode=(2,))), text(6, 32), PROMPT)


def make_half_problem():
    """Decode's blocks 0 and 3 run without attention, 1 without MLP: three KV layers of five."""
    keep, half = Keep(), WithoutAttention()
    plan = PDPlan.uncut(make_plan().model, (keep,) * 5, (half, WithoutMLP(), keep, half, keep))
    return Problem(make_oracle(tiny("Llama"), plan), text(6, 32), PROMPT)


def exact(problem, kv):
    """KL(uncut || kv) of all but the first token, straight from the oracle."""
    total, prompt = [], problem.prompt_tokens
    for ids in problem.sequences:
        rows = []
        for sends in (DENSE[: len(kv)], kv):
            top, logprobs = problem.oracle.with_kv(sends).top_logprobs(ids[:prompt], ids[prompt:], 97)
            rows.append(torch.zeros_like(logprobs).scatter(1, top, logprobs).double()[1:])
        total.append(float((rows[0].exp() * (rows[0] - rows[1])).sum(1).mean()))
    return sum(total) / len(total)


def test_the_probe_is_kl_to_second_order():
    runner = make_problem().oracle.decode
    hidden = torch.randn(2, 40, 24, generator=torch.Generator().manual_seed(1))
    moved = hidden + 0.01 * torch.randn(2, 40, 24, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        probe = Probe(runner, hidden, draws=400, seed=0)
        before, after = (runner.logits(h).log_softmax(-1) for h in (hidden, moved))
        kl = float((before.exp() * (before - after)).sum(-1).mean())
        assert float(probe.change(moved).square().sum()) / 2 / 80 == pytest.approx(kl, rel=0.05)
        assert not probe.change(hidden).any()


@pytest.mark.parametrize("family", ["Llama", "Qwen3"])
def test_divergence_is_that_of_the_oracle(family):
    problem = make_problem(family)
    measure = Measure(problem, OPTIONS, quiet, batch=4)
    mixed = (OPTIONS[4], OPTIONS[0], OPTIONS[11], OPTIONS[7])
    assert measure.divergence(mixed) == pytest.approx(exact(problem, mixed), abs=1e-5)
    assert measure.divergence(DENSE) == pytest.approx(0, abs=1e-7)


def test_layers_without_attention_have_no_rule_and_are_run():
    problem = make_half_problem()
    measure, none = Measure(problem, OPTIONS, quiet, batch=4, draws=200), DENSE[:3]
    mixed = (OPTIONS[4], OPTIONS[11], OPTIONS[7])
    assert measure.divergence(mixed) == pytest.approx(exact(problem, mixed), abs=1e-5)
    effects = measure.about(none)
    for layer in range(3):
        rounded = tuple(OPTIONS[1] if at == layer else KVSend() for at in range(3))
        predicted = float(effects.gram[layer, 1, layer, 1]) / 2
        assert predicted == pytest.approx(exact(problem, rounded), rel=0.2)
    sends = ByBudget(OPTIONS, reduction=4.0).choose(problem, quiet)
    assert problem.oracle.plan.with_kv(sends).reduction(PROMPT) >= 4


def test_what_was_measured_may_be_kept():
    """Another budget of the same problem asks for nothing that was measured; other options are other effects."""
    known, measured = {}, []

    def memo(name, make):
        if name not in known:
            known[name] = make()
            measured.append(name)
        return known[name]

    plain, problem = make_problem(), replace(make_problem(), memo=memo)
    tight, loose = ByBudget(OPTIONS, reduction=4.0), ByBudget(OPTIONS, reduction=2.0)
    sends = tight.choose(problem, quiet)
    assert sends == tight.choose(plain, quiet)
    assert measured
    before = len(measured)
    assert tight.choose(problem, quiet) == sends
    assert len(measured) == before
    assert loose.choose(problem, quiet) == loose.choose(plain, quiet)
    ByBudget(OPTIONS[:6], reduction=2.0).choose(problem, quiet)
    assert len(set(measured)) == len(measured) > before


def test_a_measurement_that_is_stopped_goes_on_behind_the_last_whole_batch():
    """To the same bits. `problem.memo` is what a build keeps in the cache."""
    known, lines = {}, []

    def memo(name, make):
        return known[name] if name in known else known.setdefault(name, make())

    def stop_in_the_last_batch(line):
        lines.append(line)
        if "batch 3/3" in line:
            raise KeyboardInterrupt

    problem = replace(make_problem(), memo=memo)
    whole = Measure(make_problem(), OPTIONS, quiet, batch=2).about(DENSE)
    with pytest.raises(KeyboardInterrupt):
        Measure(problem, OPTIONS, stop_in_the_last_batch, batch=2).about(DENSE)
    assert [any(f"batch {n}/3" in line for line in lines) for n in (1, 2, 3)] == [True] * 3
    lines.clear()
    resumed = Measure(problem, OPTIONS, lines.append, batch=2).about(DENSE)
    assert {line.partition(":")[0] for line in lines if "batch" in line} == {"effects, batch 3/3"}
    assert torch.equal(resumed.gram, whole.gram)
    assert torch.equal(resumed.linear, whole.linear)


def test_effects_foretell_the_divergence_of_small_changes_and_add_up_about_any_context():
    problem = make_problem()
    measure = Measure(problem, OPTIONS, quiet, draws=300)
    about_dense = measure.about(DENSE)
    assert about_dense.error == 0
    assert not about_dense.linear.any()
    for layer, option in ((0, 9), (1, 10), (3, 2), (2, 9)):  # 19 of 20 rows, or a wire dtype
        plan = tuple(OPTIONS[option] if at == layer else send for at, send in enumerate(DENSE))
        foretold = float(about_dense.gram[layer, option, layer, option]) / 2
        assert foretold == pytest.approx(measure.divergence(plan), rel=0.35)
    context = (OPTIONS[5], OPTIONS[9], OPTIONS[0], OPTIONS[1])
    about = measure.about(context)
    for layer, send in enumerate(context):
        sent = OPTIONS.index(send)
        assert not about.gram[layer, sent].any()
        assert about.linear[layer, sent] == 0
    matrix = about.gram.reshape(48, 48)
    assert torch.allclose(matrix, matrix.T)
    assert torch.linalg.eigvalsh(matrix).min() > -1e-6


def test_a_budget_is_kept_and_more_of_it_harms_less():
    problem = make_problem()
    search = budget_search(problem, OPTIONS, quiet)
    dense = problem.oracle.plan.dense_bytes(PROMPT)
    harms = []
    for reduction in (1.3, 2.5, 6):
        result = search.within(int(dense / reduction))
        plan = problem.oracle.with_kv(result.sends).plan
        assert result.cost == plan.payload_bytes(PROMPT)
        assert plan.reduction(PROMPT) >= reduction
        assert result.harm == pytest.approx(exact(problem, result.sends), abs=1e-5)
        harms.append(result.harm)
    assert harms == sorted(harms)
    uniform = (KVSend(mode="sparse", n_first=1, n_last=9),) * 4  # 2x of the rows in each of 4 of 5 blocks: 2.5x
    assert problem.oracle.with_kv(uniform).plan.reduction(PROMPT) == 2.5
    assert harms[1] < exact(problem, uniform)


def test_a_loss_is_kept_in_fewer_bytes_the_larger_it_may_be():
    problem = make_problem()
    sizes = []
    for loss in (0.01, 0.2):
        sends = ByBudget(OPTIONS, max_loss=loss).choose(problem, quiet)
        assert exact(problem, sends) <= math.log1p(loss)
        sizes.append(problem.oracle.with_kv(sends).plan.payload_bytes(PROMPT))
    assert sizes[1] < sizes[0] < problem.oracle.plan.dense_bytes(PROMPT)


def test_a_loss_that_only_the_dearest_options_keep_is_kept():
    problem = make_problem()
    cut = tuple(row.model_copy(update={"wire_dtype": "int4"}) for row in ROWS[1:])
    assert ByBudget((KVSend(), *cut), max_loss=1e-9).choose(problem, quiet) == DENSE
    alone = KVSend(wire_dtype="int8")  # one option has one price: there is nothing to bisect
    assert ByBudget((alone,), max_loss=0.5).choose(problem, quiet) == (alone,) * 4


def test_what_cannot_be_met_is_said():
    problem = make_problem()
    with pytest.raises(UserError, match=r"the smallest options cost \d+; allow more"):
        ByBudget(OPTIONS, reduction=1000).choose(problem, quiet)
    cut = (KVSend(mode="sparse", n_first=1, n_last=2, wire_dtype="int4"),)
    with pytest.raises(UserError, match=r"no plan loses at most 0\.00%, whatever its size; allow a larger max_loss"):
        ByBudget(cut, max_loss=1e-9).choose(problem, quiet)


def test_a_reduction_holds_at_every_length_that_effects_are_measured_at():
    """Cut layers that keep a share of the prompt cost as large a part of dense bytes at each."""
    short = make_problem()
    longer = replace(short, sequences=text(6, 52, seed=3), prompt_tokens=40)
    problem = replace(short, longer=(longer,))
    shares = tuple(KVSend(mode="sparse", n_first=1, n_last=1, share=share) for share in (205, 410, 717))
    search = budget_search(problem, (KVSend(), *shares), quiet)
    dense = problem.oracle.plan.dense_bytes(PROMPT)
    result = search.within(dense // 2)
    plan = problem.oracle.with_kv(result.sends).plan
    assert {send.mode for send in result.sends} >= {"sparse"}
    assert plan.reduction(PROMPT) >= 2
    assert 2 <= plan.reduction(40) < 2.2
    assert result.harm == pytest.approx((exact(short, result.sends) + exact(longer, result.sends)) / 2, abs=1e-5)
    assert search.measure.about(DENSE).gram[0, 1, 0, 1] == pytest.approx(
        sum(float(budget_search(each, search.measure.options, quiet).measure.about(DENSE).gram[0, 1, 0, 1])
            for each in (short, longer)) / 2
    )  # fmt: skip
    more = budget_search(problem, (KVSend(), *shares, KVSend(mode="sparse", n_first=1, n_last=9)), quiet)
    costs = dict(zip(more.measure.options, more.costs[0], strict=True))
    rows = {option: [option.rows(tokens) / tokens for tokens in (PROMPT, 40)] for option in costs}
    assert {option: cost * 20 / costs[KVSend()] for option, cost in costs.items()} == {
        option: 20 * max(of_prompt) for option, of_prompt in rows.items()
    }


def test_every_layer_may_have_its_own_price():
    problem = make_problem()
    measure = Measure(problem, (KVSend(), ROWS[1]), quiet)
    costs = np.array([[5, 0], [1, 0], [1, 0], [5, 0]])
    result = BudgetSearch(measure, costs, quiet).within(6)
    assert result.cost <= 6
    assert sum(send == KVSend() for send in result.sends) == 2


def held_bytes(thing):
    """Of all tensors that `thing` keeps, each storage once."""
    seen, todo, storages = set(), [thing], {}
    while todo:
        each = todo.pop()
        if id(each) in seen or isinstance(each, torch.nn.Module | Problem):
            continue
        seen.add(id(each))
        if isinstance(each, torch.Tensor):
            storages[each.untyped_storage().data_ptr()] = each.untyped_storage().nbytes()
        elif isinstance(each, dict):
            todo += each.values()
        elif isinstance(each, list | tuple):
            todo += each
        else:
            todo += vars(each).values() if hasattr(each, "__dict__") else ()
    return sum(storages.values())


def test_memory_hardly_grows_with_the_number_of_sequences():
    def measured(count):
        oracle = make_oracle(tiny("Llama"), make_plan(decode=(2,)))
        measure = Measure(Problem(oracle, text(count, PROMPT + 6), PROMPT), OPTIONS, quiet, batch=4)
        measure.about(DENSE)
        return held_bytes(measure._batches)

    kv = 4 * 2 * 2 * 8 * PROMPT * 4  # of one sequence, layers x sides x heads x width x tokens x bytes
    more = (measured(12) - measured(4)) / 8
    assert 0 < more < kv / 3  # what decode reads and what it should give: hidden states of 5 tokens


@pytest.mark.parametrize("kv_dtype", ["float32", "bfloat16"])
def test_prompt_kv_in_a_file_is_what_the_oracle_hands_over(kv_dtype, tmp_path):
    oracle = make_oracle(tiny("Qwen3"), make_plan(decode=(2,), kv_dtype=kv_dtype))
    state, wires = oracle.prefill(text(3, PROMPT)), ("native", "int8", "int4")
    prompt_kv = PromptKV(oracle, state, wires, tmp_path)
    assert list(tmp_path.iterdir()) == []  # it has no name to be left behind
    for rows in ROWS:
        for wire in wires:
            send = rows.model_copy(update={"wire_dtype": wire})
            for layer, kv in enumerate(oracle.with_kv((send,) * 4).hand_over(state)):
                read = prompt_kv.read(wire, layer, kv.ranges)
                assert read.ranges == kv.ranges
                assert torch.equal(read.keys, kv.keys)
                assert torch.equal(read.values, kv.values)


def test_a_full_disk_is_said_in_one_sentence(monkeypatch, tmp_path):
    def full(self, *_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(PromptKV, "_write", full)
    oracle = make_oracle(tiny("Llama"), make_plan())
    with pytest.raises(UserError, match=r"no room for the prompts' KV in .* \(No space left on device\); free some"):
        PromptKV(oracle, oracle.prefill(text(1, 8)), ("native",), tmp_path)
