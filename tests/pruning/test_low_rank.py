"""Changes by a diagonal and a low rank: exact where the truth is one, better than whole maps where text is short."""

import pytest
import torch
from tinypd import make_plan, text, tiny

from pdtrim_deploy.models.blockwise import Blockwise
from pdtrim_deploy.models.layer_run import LayerRun
from pdtrim_deploy.pipeline import fit_tokens
from pdtrim_deploy.pruning.compensation import FitRules, get_compensation
from pdtrim_deploy.pruning.least_squares import RIDGES, Ridge
from pdtrim_deploy.pruning.low_rank import Equations, low_rank_change, most_rank, parts
from pdtrim_deploy.pruning.pair import StagePair
from pdtrim_deploy.pruning.pd_loss import pd_loss
from pdtrim_deploy.recipe import Recipe
from pdtrim_deploy.recipe.healing import TOKENS_A_FEATURE, HealingSection

IN, OUT = 24, 16


def normal(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


WEIGHT = normal(OUT, IN, seed=0)
TRUTH = WEIGHT.T * (0.1 * normal(OUT, seed=1)) + 0.3 * normal(IN, 2, seed=2) @ normal(2, OUT, seed=3)


def tokens(count, seed, noise=0.0, truth=TRUTH):
    x = normal(count, IN, seed=seed)
    return x, x @ truth + noise * normal(count, OUT, seed=seed + 1)


def equations(x, y):
    return Equations(x.T @ x, x.T @ y, float(y.square().sum()))


def error_of(change, x, y):
    return float((y - x @ change).square().sum())


def test_equations_say_what_a_change_leaves():
    x, y = tokens(50, 10, noise=0.3)
    change = normal(IN, OUT, seed=4)
    left = equations(x, y).after(change)
    assert left.error == pytest.approx(error_of(change, x, y))
    torch.testing.assert_close(left.cross, x.T @ (y - x @ change))


def test_a_diagonal_and_two_directions_are_found():
    fit, check = tokens(4000, 20, noise=0.01), tokens(500, 30, noise=0.01)
    change, error = low_rank_change(equations(*fit), equations(*check), WEIGHT, OUT, (1e-9,))
    assert (change - TRUTH).norm() < 0.02 * TRUTH.norm()
    assert error < 0.01 * error_of(0 * change, *check)
    few, _ = low_rank_change(equations(*fit), equations(*check), WEIGHT, 1, (1e-9,))
    assert error_of(few, *check) > 10 * error_of(change, *check)


def test_the_error_is_that_of_what_the_fit_alone_gives():
    fit, check = tokens(30, 40, noise=0.5), tokens(40, 50, noise=0.5)
    _, error = low_rank_change(equations(*fit), equations(*check), WEIGHT, 3, RIDGES)
    errors = [error_of(0 * TRUTH, *check)]
    for penalty in RIDGES:
        diagonal, moves, directions = parts(equations(*fit), WEIGHT.T, penalty)
        changes = [diagonal + moves[:, :rank] @ directions[:, :rank].T for rank in range(4)]
        assert torch.linalg.matrix_rank(changes[2] - diagonal) == 2
        errors += [error_of(change, *check) for change in changes]
    assert error == pytest.approx(min(errors))
    assert error < errors[0]


def test_on_short_text_it_loses_less_on_other_text():
    truth = WEIGHT.T * (0.1 * normal(OUT, seed=1)) + 0.3 * normal(IN, 1, seed=2) @ normal(1, OUT, seed=3)
    fit, check = (tokens(count, seed, noise=2.0, truth=truth) for count, seed in ((56, 60), (16, 70)))
    other = tokens(2000, 80, truth=truth)
    ridge = Ridge(IN, OUT, torch.device("cpu"))
    for (x, y), checked in ((fit, False), (check, True)):
        ridge.add(x, y, checked)
    whole, low = (ridge.solve(WEIGHT, falls_back=back)[0] for back in (False, True))
    errors = [error_of((weight - WEIGHT).T, *other) for weight in (whole, low)]
    assert errors[1] < 0.8 * errors[0]
    assert errors[1] < error_of(0 * truth, *other)


@pytest.mark.parametrize(("count", "same"), [(TOKENS_A_FEATURE * IN - 1, False), (TOKENS_A_FEATURE * IN, True)])
def test_it_falls_back_below_ten_tokens_a_feature(count, same):
    ridge = Ridge(IN, OUT, torch.device("cpu"))
    ridge.add(*tokens(count - 20, 90, noise=0.5), check=False)
    ridge.add(*tokens(20, 100, noise=0.5), check=True)
    assert torch.equal(ridge.solve(WEIGHT)[0], ridge.solve(WEIGHT, falls_back=True)[0]) == same


@pytest.mark.parametrize("falls_back", [False, True])
def test_a_map_that_reads_nothing_stays_as_it_is(falls_back):
    """As the MLP of a block that somebody has zeroed."""
    ridge = Ridge(IN, OUT, torch.device("cpu"))
    for check in (False, True):
        ridge.add(torch.zeros(30, IN), normal(30, OUT, seed=5), check)
    weight, before, after = ridge.solve(WEIGHT, falls_back=falls_back)
    assert torch.equal(weight, WEIGHT)
    assert before == after


def test_ranks_have_ten_tokens_for_each_unknown():
    assert most_rank(1792, 1536, 576) == 1792 * 576 // (10 * (1536 + 576)) == 48
    assert most_rank(10**9, 40, 24) == 24
    assert most_rank(3, 1536, 576) == 0


def test_a_share_is_a_fraction_of_a_token():
    whole, halves = (Ridge(IN, OUT, torch.device("cpu")) for _ in range(2))
    x, y = tokens(40, 110)
    whole.add(x, y, check=False)
    for _ in range(2):
        halves.add(x, y, check=False, share=0.5)
    torch.testing.assert_close(halves.gram[0], whole.gram[0], rtol=1e-6, atol=1e-5)
    assert halves.error[0] == pytest.approx(whole.error[0], rel=1e-6)
    assert halves.tokens[0] == whole.tokens[0] == 40


def test_prompt_positions_make_decode_a_better_whole_model():
    model, ids = tiny("Llama"), text(24, 40)
    pair = StagePair(model, make_plan((), (1, 3)))

    def fitted(**rules):
        return get_compensation("least-squares", FitRules(**rules)).compensate(pair, "decode", ids, lambda _: None)

    def alone(mended):
        """Relative squared error of decode's last states on whole texts, against the dense model's."""
        with torch.no_grad():
            (out,), (dense,) = (
                LayerRun(Blockwise(whole), [ids[:, :20]]).finish() for whole in (mended.stage("decode"), model)
            )
        return float((out - dense).square().sum() / dense.square().sum())

    plain, with_prompts = fitted(), fitted(prompt_share=1.0)
    assert alone(with_prompts) < 0.95 * alone(plain)
    assert pd_loss(with_prompts, ids) != pd_loss(plain, ids)
    prefill = StagePair(model, make_plan((1,), (1,)))
    same = [
        get_compensation("least-squares", FitRules(prompt_share=share)).compensate(
            prefill, "prefill", ids, lambda _: None
        )
        for share in (0.0, 0.5)
    ]
    for block, tensors in same[0].changed["prefill"].items():
        assert torch.equal(tensors["mlp.down_proj.weight"], same[1].changed["prefill"][block]["mlp.down_proj.weight"])


def test_a_judge_of_a_part_of_the_text_falls_back_where_the_build_does():
    model, ids = tiny("Llama"), text(8, 64)
    pair = StagePair(model, make_plan((), (1, 3)))

    def weights(ids, rules):
        changed = get_compensation("least-squares", rules).compensate(pair, "decode", ids, lambda _: None).changed
        return torch.cat([tensors["mlp.down_proj.weight"].flatten() for tensors in changed["decode"].values()])

    features = model.config.intermediate_size
    enough = -(-TOKENS_A_FEATURE * features // 32)  # sequences of 32 tokens behind their prompts
    assert 32 * len(ids) < TOKENS_A_FEATURE * features
    section = {"compensation": "least-squares", "fit": "auto", "length": 64}
    short, long = (FitRules.of(HealingSection(**section, sequences=sequences)) for sequences in (enough - 1, enough))
    assert torch.equal(weights(ids, long), weights(ids, FitRules()))
    assert torch.equal(weights(ids, short), weights(ids, FitRules(falls_back=True)))
    assert not torch.equal(weights(ids, short), weights(ids, long))


@pytest.mark.parametrize("healing", [{}, {"prompt_share": 0.25}], ids=["behind prompts", "with prompts"])
@pytest.mark.parametrize("target", [None, {"itl": 0.8}, {"ttft": 0.8}], ids=["blocks", "itl", "ttft"])
def test_the_tokens_that_a_recipe_is_told_of_are_those_that_are_fitted(monkeypatch, healing, target):
    model, ids, fed = tiny("Llama"), text(8, 33), []

    class Counted(Ridge):
        def solve(self, *args, **kwargs):
            fed.append(sum(self.tokens))
            return super().solve(*args, **kwargs)

    monkeypatch.setattr("pdtrim_deploy.pruning.least_squares.Ridge", Counted)
    section = {"compensation": "least-squares", "sequences": 8, "length": 33} | healing
    pruning = {} if target else {"decode_blocks": 2}
    recipe = Recipe(name="a", model={"source": "pypi:x"}, pruning=pruning, healing=section, target=target)
    stage = "prefill" if target == {"ttft": 0.8} else "decode"
    lost = ((1, 3), (1, 3)) if stage == "prefill" else ((), (1, 3))
    method = get_compensation("least-squares", FitRules.of(recipe.healing))
    method.compensate(StagePair(model, make_plan(*lost)), stage, ids, lambda _: None)

    class Sizes:
        inner = model.config.intermediate_size

    sentence = fit_tokens.fit_sentence(recipe, Sizes())
    assert f"least squares have {fed[0]:,.0f} tokens" in sentence
    assert sentence.startswith("decode's") == (stage == "decode")


def test_a_recipe_says_when_its_text_is_short():
    class Sizes:
        inner = 1536

    def sentence(**healing):
        pruning = {"decode_blocks": 2}
        section = {"compensation": "least-squares"} | healing
        recipe = Recipe(name="a", model={"source": "pypi:x"}, pruning=pruning, healing=section)
        return fit_tokens.fit_sentence(recipe, Sizes())

    assert "decode's least squares have 2,048 tokens for 1,536 features of a map, 1.3 a" in sentence(sequences=16)
    assert "healing.sequences of 120" in sentence(sequences=16)
    assert sentence(sequences=120) is None
    assert "healing.fit_sequences of 120" in sentence(sequences=400, fit_sequences=16)
    assert sentence(sequences=400, fit_sequences=120) is None
    assert sentence(sequences=119, fit="auto").endswith("so each map is changed by a diagonal and a low rank alone")
    assert sentence(compensation="norm", sequences=16) is None
    assert sentence(sequences=60, prompt_share=1.0) is None
    assert "15,104 tokens (a prompt's count 1 each) for 1,536" in sentence(sequences=59, prompt_share=1.0)
