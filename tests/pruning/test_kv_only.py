"""Blocks that prefill runs for their K and V alone: exact where the state before is, fitted where it is not."""

from dataclasses import replace

import pytest
import torch
from stagepairs import kl, pair_of
from tinypd import FAMILIES, text, tiny

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.models.blockwise import Blockwise
from pdtrim_deploy.models.layer_kv import LayerKV
from pdtrim_deploy.models.oracle import PDOracle
from pdtrim_deploy.plan import WithoutMLP
from pdtrim_deploy.pruning.compensation import get_compensation
from pdtrim_deploy.pruning.healing import frozen_states, heal
from pdtrim_deploy.pruning.healing.learnt import learns, learnt, trained_model
from pdtrim_deploy.pruning.healing.losses import LogitLoss
from pdtrim_deploy.pruning.healing.pair_reader import PairReader
from pdtrim_deploy.pruning.healing.stage_reader import PrefillKV
from pdtrim_deploy.pruning.healing.weights import FullWeights
from pdtrim_deploy.pruning.kv_only import _given_up, candidates, fit, fit_kv_only, make_kv_only, rank
from pdtrim_deploy.pruning.pair import StagePair
from pdtrim_deploy.pruning.pd_loss import pd_loss
from pdtrim_deploy.pruning.students.regression import FROZEN
from pdtrim_deploy.recipe.healing import HealingSection

ZEROS = {"self_attn.o_proj.weight", "mlp.down_proj.weight"}
QUIET = lambda _: None  # noqa: E731


def kv_of(model, ids):
    runner, kvs = Blockwise(model), []
    with torch.no_grad():
        hidden, span = runner.embed(ids)
        for layer in range(len(runner.layers)):
            kvs.append(LayerKV())
            hidden = runner.block(layer, hidden, span, kvs[-1])
    return kvs, hidden


@pytest.mark.parametrize("family", FAMILIES)
def test_the_first_is_exact_and_those_behind_come_nearer(family):
    """Blocks 2 and 3 given up: block 2 still reads the dense state, block 3 reads x_2 in the place of x_3."""
    model, fresh = tiny(family), text(4, 24, seed=3)
    pair = _given_up(pair_of(model, (), ()), {2, 3})
    fitted = fit(pair, text(64, 24), QUIET)
    (dense, _), (before, hidden), (after, _) = (
        kv_of(m, fresh) for m in (model, pair.stage("prefill"), fitted.stage("prefill"))
    )
    assert torch.equal(after[2].keys, dense[2].keys)
    assert torch.equal(after[2].values, dense[2].values)
    for side in ("keys", "values"):
        expected = getattr(dense[3], side)
        errors = [(getattr(kvs[3], side) - expected).norm() / expected.norm() for kvs in (before, after)]
        assert errors[1] < 0.95 * errors[0]
    layers = model.model.layers  # the hidden state goes by untouched
    runner = Blockwise(model)
    with torch.no_grad():
        x, span = runner.embed(fresh)
        for block in (0, 1, 4):
            x = runner.block(block, x, span)
    torch.testing.assert_close(hidden, x)
    assert layers[2].mlp.down_proj.weight.abs().sum() > 0  # the dense model is as it was


def test_it_gives_up_what_costs_least_and_all_else_stays():
    model, ids = tiny("Llama"), text(16, 24)
    pair = pair_of(model, (), (4,))
    assert candidates(pair.plan) == (0, 1, 2, 3)
    notes = []
    single, double = make_kv_only(pair, 1, ids), make_kv_only(pair, 2, ids, notes.append)
    assert [note.partition(" blocks")[0] for note in notes[-2:]] == [
        f"least squares of K and V alone: {done}/2" for done in (1, 2)
    ]
    assert len(double.plan.kv_only_layers) == 2
    assert set(single.plan.kv_only_layers) < set(double.plan.kv_only_layers)
    assert double.plan.decode == pair.plan.decode
    worst = max(candidates(pair.plan), key=lambda block: kl(_given_up(pair, {block}), "decode", ids))
    assert worst not in double.plan.kv_only_layers
    more = make_kv_only(pair, 2, torch.cat((ids, text(16, 24, seed=9))))  # 16 sequences choose
    assert more.plan == double.plan
    with pytest.raises(UserError, match="kv_only_blocks is 5 but only 4 blocks are kept by both"):
        make_kv_only(pair, 5, ids)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_block_s_cost_is_the_loss_of_the_pair_without_it(family):
    """`rank` runs what is before a block once for all; whole runs of each pair say the same."""
    pair, ids, notes = pair_of(tiny(family), (2,), (2, 4)), text(10, 24), []
    order = rank(pair, ids, notes.append)
    losses = {block: pd_loss(_given_up(pair, {block}), ids) for block in candidates(pair.plan)}
    assert list(order) == sorted(losses, key=losses.get)
    reported = dict(part.removeprefix("without block ").split(": loss ") for part in notes[-1].split("; "))
    assert reported == {str(block): f"{losses[block]:.4f}" for block in order[:4]}


@pytest.mark.parametrize("family", FAMILIES)
def test_with_a_tail_it_is_the_last_blocks(family):
    """K and V of the first of them are exact, and so is all that comes before. Decode need not read them all."""
    pair, ids = pair_of(tiny(family), (), ()), text(8, 24)
    more = make_kv_only(pair, 2, ids, tail=5)
    assert more.plan.kv_only_blocks == pair.plan.prefill_layers[-2:]
    assert more.plan.kv_only_tail == 5
    (dense, _), (body, _) = (kv_of(model, ids) for model in (pair.model, more.stage("prefill")))
    for expected, result in zip(dense[:-1], body[:-1], strict=True):
        assert torch.equal(result.keys, expected.keys)
        assert torch.equal(result.values, expected.values)
    assert not torch.equal(body[-1].keys, dense[-1].keys)
    lost = pair_of(tiny(family), (), pair.plan.prefill_layers[-1:])
    assert make_kv_only(lost, 2, ids, tail=5).plan.kv_only_blocks == more.plan.kv_only_blocks


def test_with_a_tail_blocks_that_end_prefill_whole_are_as_many_as_may_be_given_up():
    pair = pair_of(tiny("Llama"), (), ())
    cut = (*pair.plan.prefill[:3], WithoutMLP(), pair.plan.prefill[4])
    pair = StagePair(pair.model, pair.plan.with_parts(prefill=cut, decode=cut))
    assert make_kv_only(pair, 1, text(8, 24), tail=5).plan.kv_only_blocks == (4,)
    with pytest.raises(UserError, match="is 2 but only 1 blocks at the end of prefill run whole; ask for fewer"):
        make_kv_only(pair, 2, text(8, 24), tail=5)


def test_a_loss_that_is_not_a_number():
    model = tiny("Llama")
    with torch.no_grad():
        model.model.layers[3].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(UserError, match=r"the loss without block 0 in prefill is nan; load the model in float32"):
        rank(pair_of(model, (), (4,)), text(4, 24))


def test_neither_compensation_nor_healing_wakes_them():
    ids = text(16, 24)
    pair = make_kv_only(pair_of(tiny("Qwen3"), (), (4,)), 2, ids)
    pair = get_compensation("least-squares").compensate(pair, "prefill", ids, QUIET)
    pair = heal(pair, "prefill", ids, HealingSection(prefill_steps=3, batch=2, learning_rate=1e-3)).pair
    for layer in pair.plan.kv_only_layers:
        changed = pair.changed["prefill"][pair.plan.prefill_layers[layer]]
        assert all(name.startswith(FROZEN) for name in set(changed) - ZEROS)
        assert not any(changed[name].any() for name in ZEROS)


@torch.no_grad()
def served_kl(pair, ids, judged_from=0, prompt=None):
    """KL from the dense model of what a pair says: prefill's first token, then decode's; nats a token.

    Prompts, by default half of each sequence, have no tail: as training sees them.
    """
    half = ids.shape[1] // 2 if prompt is None else prompt
    oracle = PDOracle(pair.stage("prefill"), pair.stage("decode"), pair.plan.with_parts(kv_only_tail=0))
    state = oracle.prefill(ids[:, :half])
    decode = oracle.decode.logits(oracle.extend(ids[:, half:-1], half, oracle.hand_over(state)))
    served = torch.cat((state.logits[:, None], decode), 1).log_softmax(-1)
    meant = pair.model(ids[:, :-1]).logits[:, half - 1 :].log_softmax(-1)
    return float((meant.exp() * (meant - served)).sum(-1)[:, judged_from:].mean())


@torch.no_grad()
@pytest.mark.parametrize("family", ["Llama", "Qwen3"])
def test_decode_is_trained_on_the_kv_that_the_tail_makes(family):
    pair, prompts = fit_kv_only(pair_of(tiny(family), (), (1,)), {2, 3, 4}, text(32, 24), tail=5), text(2, 12)
    served = PDOracle(pair.stage("prefill"), pair.stage("decode"), pair.plan)
    held, bodies = (
        PrefillKV(pair)(prompts),
        PrefillKV(replace(pair, plan=pair.plan.with_parts(kv_only_tail=0)))(prompts),
    )
    for kv, expected in zip(held, served.hand_over(served.prefill(prompts)), strict=True):
        torch.testing.assert_close((kv.keys, kv.values), (expected.keys, expected.values))
    torch.testing.assert_close(held[-1].keys[:, :, :-5], bodies[-1].keys[:, :, :-5])
    assert not torch.allclose(held[-1].keys[:, :, -5:], bodies[-1].keys[:, :, -5:])


@pytest.mark.parametrize(("family", "method"), [*((family, "full") for family in FAMILIES), ("Llama", "lora")])
def test_prefill_learns_by_what_decode_reads_of_it(family, method):
    """K and V of the two blocks learn with what is left of prefill; what is exact and decode stay."""
    model, ids, fresh = tiny(family), text(96, 24), text(16, 24, seed=5)
    pair = fit_kv_only(pair_of(model, (), (4,)), {2, 3}, ids)
    section = HealingSection(prefill_steps=40, learning_rate=2e-3, sweep=(1.0,), batch=8, method=method)
    done = heal(pair, "prefill", ids, section)
    assert done.kept
    assert done.test.before == pytest.approx(served_kl(pair, ids[-12:]), rel=1e-4)
    assert done.test.after == pytest.approx(served_kl(done.pair, ids[-12:]), rel=1e-4)
    assert served_kl(done.pair, fresh) < served_kl(pair, fresh)
    assert done.pair.changed.keys() == {"prefill"}
    before, after = pair.changed["prefill"], done.pair.changed["prefill"]
    assert min(after) == 1  # block 0 is exact, and not the last in front of the gap
    for block in (2, 3):
        trained = {name for name, tensor in after[block].items() if tensor is not before[block].get(name)}
        assert {"self_attn.k_proj.weight", "self_attn.v_proj.weight"} <= trained
        assert all(name.startswith(FROZEN) for name in trained)
    for block in (1, 4):
        assert "mlp.down_proj.weight" in after[block]
        assert not any(name.startswith(FROZEN) for name in after[block])


def test_with_a_tail_prefill_learns_by_what_is_served_behind_it():
    """Prefill's first token, which this prefill gets wrong for want of its last block, counts nothing."""
    ids = text(192, 24)
    pair = _given_up(pair_of(tiny("Llama"), (), ()), {2, 3, 4}, 5)  # K and V are not fitted
    rates = {"learning_rate": 2e-3, "sweep": (1.0,), "batch": 8}
    section = HealingSection(kv_only_blocks=3, kv_only_tail=5, prefill_steps=60, **rates)
    done = heal(pair, "prefill", ids, section)
    assert done.kept
    assert done.test.before == pytest.approx(served_kl(pair, ids[-24:], 5, 14), rel=1e-4)  # all but twice the tail
    assert done.test.after == pytest.approx(served_kl(done.pair, ids[-24:], 5, 14), rel=1e-4)
    learnt_by = {block for block, tensors in done.pair.changed["prefill"].items() if set(tensors) - ZEROS}
    assert learnt_by == {2, 3, 4}, "tails run the block before these too, and it is the model's own"


def test_with_a_tail_no_step_is_for_hidden_states_which_none_of_what_is_trained_changes():
    pair = fit_kv_only(pair_of(tiny("Llama"), (), ()), {3, 4}, ids := text(32, 24), tail=5)
    section = HealingSection(kv_only_blocks=2, kv_only_tail=5, prefill_steps=4, sweep=(1.0,), regression=0.5)
    (phase,) = heal(pair, "prefill", ids, section).training["phases"]
    assert (phase["loss"], phase["steps"]) == ("logits", 4)


def test_blocks_that_the_tail_alone_reads_are_not_trained():
    """Training sees what decode reads; where that is none of them, there is nothing to train."""
    ids = text(32, 24)
    section = HealingSection(kv_only_blocks=2, kv_only_tail=5, prefill_steps=2, sweep=(1.0,))
    for alone, some in (({3, 4}, True), ({4}, False)):
        pair = fit_kv_only(pair_of(tiny("Llama"), (), (4,)), alone, ids, tail=5)
        names = learnt(pair, "prefill", trained_model(pair, "prefill"))
        assert [bool(of_layer) for of_layer in names] == [False, False, False, some, False]
        assert learns(pair, "prefill") is some
    assert heal(fit_kv_only(pair_of(tiny("Llama"), (), (4,)), {3, 4}, ids, tail=5), "prefill", ids, section).steps == 2


@pytest.mark.parametrize(("lost", "shared"), [((), 2), ((1,), 1), ((4,), 2)])
def test_layers_that_all_share_are_run_once_with_the_same_gradients(lost, shared):
    ids = text(16, 24)
    pair, text_of_two = fit_kv_only(pair_of(tiny("Qwen3"), (), lost), {2, 3, 4}, ids, tail=5), text(2, 24, seed=3)
    assert pair.shared_layers == shared
    gradients, losses, runs = [], [], []
    for layers in (0, shared):
        model = trained_model(pair, "prefill")
        weights = FullWeights(model, pair.plan.prefill_layers, learnt(pair, "prefill", model))
        reader, ran = PairReader(pair, model, 14, judged_from=5, shared=layers), []
        hooks = [
            stage.layers[0].register_forward_hook(lambda *_, ran=ran: ran.append(1))
            for stage in (reader.dense, reader.runner, reader._decode)
        ]
        losses.append(LogitLoss(reader).backward(text_of_two))
        for hook in hooks:
            hook.remove()
        gradients.append([master.grad for master in weights.masters])
        runs.append(len(ran))
        more = reader.divergences(ids, 2)
    assert runs == [3, 1]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for plain, once in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, once)
    again = PairReader(pair, trained_model(pair, "prefill"), 14, judged_from=5).divergences(ids, 2)
    torch.testing.assert_close(more, again, rtol=1e-5, atol=1e-8)


def count_runs(model, ran):
    return model.layers[0].register_forward_hook(lambda *_: ran.append(1))


def test_text_that_is_read_again_is_not_run_again_by_the_dense_model(tmp_path):
    ids = text(4, 24)
    pair, ran = fit_kv_only(pair_of(tiny("Qwen3"), (), ()), {2, 3, 4}, ids, tail=5), list[int]()
    model = trained_model(pair, "prefill")
    reader = PairReader(pair, model, 14, judged_from=5, shared=2, folder=tmp_path)
    plain = PairReader(pair, model, 14, judged_from=5, shared=2)
    hidden, dense = plain.hidden(ids), plain.dense_hidden(ids)
    hook = count_runs(reader.dense, ran)
    for rows, runs in (([0, 1], 2), ([1, 0], 2), ([2, 1], 3), ([3], 4), ([0, 1, 2, 3], 4)):
        part = ids[rows]
        torch.testing.assert_close(reader.hidden(part), hidden[rows])
        torch.testing.assert_close(reader.dense_hidden(part), dense[rows])
        assert len(ran) == runs, "a text that came before, beside others, is known"
    hook.remove()
    assert not any(tmp_path.iterdir()), "files go with the process"


@pytest.mark.parametrize(("steps", "kept"), [(2, False), (3, True)])
def test_states_are_kept_only_of_text_that_comes_twice(steps, kept, tmp_path, monkeypatch):
    """24 sequences, of which 18 are trained on."""
    ids, files = text(24, 24), list[object]()
    monkeypatch.setattr(frozen_states, "mapped", lambda tensor, folder: files.append(folder) or tensor)
    pair = fit_kv_only(pair_of(tiny("Llama"), (), ()), {3, 4}, ids, tail=5)
    section = HealingSection(kv_only_blocks=2, kv_only_tail=5, prefill_steps=steps, sweep=(1.0,), batch=9)
    with_files = heal(pair, "prefill", ids, section, scratch=tmp_path)
    assert files == [tmp_path] * 18 * kept
    without = heal(pair, "prefill", ids, section)
    for block, tensors in without.pair.changed["prefill"].items():
        for name, tensor in tensors.items():
            torch.testing.assert_close(with_files.pair.changed["prefill"][block][name], tensor)


def test_gradients_are_the_same_with_layers_run_again():
    pair, ids = fit_kv_only(pair_of(tiny("Llama"), (), (4,)), {2, 3}, text(16, 24)), text(2, 24)
    gradients = []
    for recomputes in (False, True):
        model = trained_model(pair, "prefill")
        weights = FullWeights(model, pair.plan.prefill_layers, learnt(pair, "prefill", model))
        LogitLoss(PairReader(pair, model, 12, recomputes)).backward(ids)
        gradients.append([master.grad for master in weights.masters])
    assert all(gradient.any() for gradient in gradients[0])
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, again)
