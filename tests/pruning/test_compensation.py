"""Compensation: what it may touch, what it is equal to, and that it brings a stage nearer to the dense model."""

import re

import pytest
import torch
from stagepairs import kl, pair_of
from tinypd import BLOCKS, FAMILIES, make_plan, text, tiny

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.evaluation.corpora.mixture import in_turn
from pdtrim_deploy.models.blockwise import Blockwise
from pdtrim_deploy.models.layer_kv import LayerKV
from pdtrim_deploy.plan import Distilled, Drop, Keep, PDPlan
from pdtrim_deploy.pruning.compensation import COMPENSATIONS, get_compensation
from pdtrim_deploy.pruning.compensation.held_out import held_out
from pdtrim_deploy.pruning.compensation.least_squares import LeastSquares
from pdtrim_deploy.pruning.pair import StagePair
from pdtrim_deploy.pruning.pd_loss import pd_loss, prefill_loss
from pdtrim_deploy.pruning.refit_judge import RefitJudge
from pdtrim_deploy.pruning.solution import NOTHING, Solution
from pdtrim_deploy.recipe.calibration import DEFAULT_MIXTURE
from pdtrim_deploy.recipe.healing import COMPENSATION_METHODS

QUIET = lambda _: None  # noqa: E731


def test_the_recipe_knows_the_methods():
    assert ("none", *COMPENSATIONS) == COMPENSATION_METHODS
    with pytest.raises(UserError, match="use one of none, norm, least-squares"):
        get_compensation("more")


@pytest.mark.parametrize("method", COMPENSATIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_only_what_a_block_adds_is_changed_and_the_dense_model_is_left_alone(family, method):
    model = tiny(family)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    pair = get_compensation(method).compensate(pair_of(model), "prefill", text(12, 24), QUIET)
    pair = get_compensation(method).compensate(pair, "decode", text(12, 24), QUIET)
    for stage in ("prefill", "decode"):
        names = {name for tensors in pair.changed[stage].values() for name in tensors}
        assert "mlp.down_proj.weight" in names
        assert names <= {"mlp.down_proj.weight", "self_attn.o_proj.weight"}
        assert set(pair.changed[stage]) <= set(pair.plan.layers(stage))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("stage", ["prefill", "decode"])
def test_least_squares_comes_nearer_on_new_text(stage):
    pair = pair_of(tiny("Llama"))
    after = get_compensation("least-squares").compensate(pair, stage, text(48, 24), QUIET)
    assert kl(after, stage, text(8, 24, seed=7)) < 0.9 * kl(pair, stage, text(8, 24, seed=7))


@pytest.mark.parametrize("stage", ["prefill", "decode"])
def test_it_says_how_far_it_is_and_what_a_refit_brought(stage):
    pair, notes = pair_of(tiny("Llama")), []
    changed = get_compensation("least-squares").compensate(pair, stage, text(12, 24), notes.append).changed[stage]
    assert [note.partition(" blocks")[0] for note in notes] == [
        f"{stage}: least squares, {depth}/{BLOCKS}" for depth in range(1, BLOCKS + 1)
    ]
    errors = [re.search(r", relative squared error (0\.\d{4}) -> (0\.\d{4})$", note) for note in notes]
    assert sum(error is not None for error in errors) == len(changed)
    assert all(float(error[2]) <= float(error[1]) for error in errors if error)


@pytest.mark.parametrize("method", COMPENSATIONS)
@pytest.mark.parametrize("stage", ["prefill", "decode"])
def test_side_by_side_is_one_after_the_other_with_less_work(stage, method, monkeypatch):
    """Of decode three pairs behind one prefill: the very same weights, and what is around them run once."""
    model, ids, ran = tiny("Qwen3"), text(12, 24), []
    gone = ((2,), (2, 3), (1, 2)) if stage == "decode" else ((2,), (3,), (0,))
    plans = [make_plan((2,), lost) if stage == "decode" else make_plan(lost, lost) for lost in gone]
    pairs, mend = [StagePair(model, plan) for plan in plans], get_compensation(method)
    block = Blockwise.block
    monkeypatch.setattr(
        Blockwise, "block", lambda self, *arguments: (ran.append(self.model), block(self, *arguments))[1]
    )
    alone = [mend.compensate(pair, stage, ids, QUIET) for pair in pairs]
    apart, _ = len(ran), ran.clear()
    together = mend.compensate_all(pairs, stage, ids, QUIET)
    block_runs = BLOCKS if stage == "prefill" or method == "norm" else BLOCKS + BLOCKS - 1
    assert apart - len(ran) == 2 * 3 * block_runs  # once instead of three times, three batches
    for separate, joint in zip(alone, together, strict=True):
        assert separate.changed[stage].keys() == joint.changed[stage].keys()
        for number, tensors in separate.changed[stage].items():
            assert all(torch.equal(tensor, joint.changed[stage][number][name]) for name, tensor in tensors.items())


def test_decode_is_fitted_behind_the_prefill_it_is_given():
    """Another prefill makes other KV, so other weights come out."""
    pair, ids = pair_of(tiny("Llama")), text(16, 24)
    fit = get_compensation("least-squares")
    decode_only = fit.compensate(pair, "decode", ids, QUIET)
    both_stages = fit.compensate(fit.compensate(pair, "prefill", ids, QUIET), "decode", ids, QUIET)
    a, b = (p.changed["decode"][4]["mlp.down_proj.weight"] for p in (decode_only, both_stages))
    assert not torch.equal(a, b)
    again = fit.compensate(pair, "decode", ids, QUIET).changed["decode"][4]["mlp.down_proj.weight"]
    assert torch.equal(a, again)


@pytest.mark.parametrize("family", FAMILIES)
def test_norm_is_the_model_that_is_lengthened_before_the_gap(family):
    """Prune&Comp as published: embeddings, o_proj and down_proj before the gap times alpha."""
    model, ids = tiny(family, rms_norm_eps=1e-12), text(4, 24)
    pair = pair_of(model, (), (2,))
    runner, norms = Blockwise(model), []
    with torch.no_grad():
        hidden, span = runner.embed(ids)
        for block in range(BLOCKS):
            norms.append(hidden[:, 1:].norm(dim=-1).mean())
            hidden = runner.block(block, hidden, span)
        alpha = norms[3] / norms[2]
        longer = runner.embed(ids)[0] * alpha
        published = pair.stage("decode")
        for block in (0, 1):
            layer = published.model.layers[block]
            for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
                linear._parameters["weight"] = torch.nn.Parameter(linear.weight * alpha, requires_grad=False)
        reference = Blockwise(published)
        for layer in range(BLOCKS - 1):
            longer = reference.block(layer, longer, span)
        got = Blockwise(get_compensation("norm").compensate(pair, "decode", ids, QUIET).stage("decode"))
        hidden, kvs = runner.embed(ids)[0], [LayerKV() for _ in range(BLOCKS - 1)]
        for layer in range(BLOCKS - 1):
            hidden = got.block(layer, hidden, span, kvs[layer])
    torch.testing.assert_close(got.logits(hidden), reference.logits(longer), rtol=2e-3, atol=2e-3)
    assert abs(float(alpha) - 1) > 0.05


def test_a_distilled_pair_leaves_no_gap():
    model = tiny("Llama")
    student = Distilled(pair=(1, 2), kv_from=1)
    base = make_plan()
    actions = (Keep(), student, student, Keep(), Drop())
    plan = PDPlan(model=base.model, prefill=base.prefill, decode=actions, kv=base.kv[:3])
    pair = StagePair(model, plan)
    assert pair.spans("decode") == ((1, 1), (3, 3), (4, 5))
    assert get_compensation("norm").compensate(pair, "decode", text(4, 24), QUIET).changed == {"decode": {}}


def test_an_error_that_is_not_a_number_is_one_sentence():
    model = tiny("Llama")
    model.model.layers[1].mlp.up_proj.weight.data[0] = float("nan")
    with pytest.raises(UserError, match="hidden states are not numbers"):
        get_compensation("norm").compensate(pair_of(model), "prefill", text(2, 24), QUIET)
    with pytest.raises(UserError, match="block 1: its error is nan"):
        get_compensation("least-squares").compensate(pair_of(model), "prefill", text(8, 16), QUIET)


@pytest.mark.parametrize("stage", ["prefill", "decode"])
@pytest.mark.parametrize("method", COMPENSATIONS)
def test_each_half_is_judged_by_what_the_other_fitted(method, stage):
    model, ids, mend = tiny("Llama"), text(9, 24), get_compensation(method)
    pair, loss = pair_of(model), prefill_loss if stage == "prefill" else pd_loss
    result = held_out(mend, pair, stage, ids)
    first, second = ids[:5], ids[5:]
    sums = 5 * loss(mend.compensate(pair, stage, second, QUIET), first)
    sums += 4 * loss(mend.compensate(pair, stage, first, QUIET), second)
    assert result.after == pytest.approx(sums / 9, abs=1e-5)
    assert result.before == pytest.approx((5 * loss(pair, first) + 4 * loss(pair, second)) / 9, abs=1e-5)
    assert result.kept == (result.after < result.before)


@pytest.mark.parametrize("shares", [(1, 1), (1, 1, 1, 1), tuple(part.share for part in DEFAULT_MIXTURE)])
@pytest.mark.parametrize("sequences", [40, 41])
def test_both_halves_hold_every_corpus_of_a_mixture_in_its_share(shares, sequences, monkeypatch):
    """Corpora take turns: every second sequence could be of one corpus alone."""
    model, corpora, fitted = tiny("Llama"), torch.tensor(in_turn(shares, sequences)), []
    ids = corpora[:, None].expand(-1, 16)  # a token for each corpus

    def fit(_, pairs, stage, ids, progress):
        fitted.append(ids[:, 0])
        return list(pairs)

    monkeypatch.setattr(LeastSquares, "compensate_all", fit)
    held_out(LeastSquares(), pair_of(model), "prefill", ids)
    list(RefitJudge(model, make_plan().model, ids, "least-squares")("prefill", NOTHING, [Solution.of((1,))]))
    assert len(fitted) == 4
    for half in fitted:
        for corpus, share in enumerate(shares):
            assert abs(int((half == corpus).sum()) - len(half) * share / sum(shares)) <= 1
