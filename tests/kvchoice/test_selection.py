import subprocess
import sys

import pytest
import torch
from tinypd import BLOCKS, VOCABULARY, make_oracle, make_plan, text, tiny

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.kvchoice import SELECTIONS, Cut, Problem, get_selection
from pdtrim_deploy.kvchoice import attention_mass as attention_masses
from pdtrim_deploy.kvchoice.attention_mass import attention_mass
from pdtrim_deploy.kvchoice.by_attention import ByAttention
from pdtrim_deploy.kvchoice.by_harm import ByMeasuredHarm
from pdtrim_deploy.kvchoice.fixed import AtRandom
from pdtrim_deploy.plan import KVSend
from pdtrim_deploy.recipe.kv import KVSection

SPARSE = KVSend(mode="sparse", n_first=1, n_last=2)
CUT = Cut(KVSend(), SPARSE)
PROMPT = 14


def quiet(_):
    pass


def make_problem(decode=(3,), seed=0):
    oracle = make_oracle(tiny("Qwen3"), make_plan(decode=decode))
    return Problem(oracle, text(5, 24), PROMPT, seed)


def section(method, sparse_layers=2):
    sizes = {"n_first": 1, "n_last": 2, "sparse_layers": sparse_layers}
    if method == "none":
        sizes = {}
    elif method == "all":
        del sizes["sparse_layers"]
    elif method == "budget":
        sizes = {"reduction": 2.0, "sparse_choices": ((1, 2),), "wire_choices": ("native",)}
    return KVSection(method=method, prompt_tokens=PROMPT, **sizes)


def sparse_of(kv):
    return [layer for layer, send in enumerate(kv) if send == SPARSE]


@pytest.mark.parametrize("method", SELECTIONS)
def test_every_method_gives_one_rule_a_layer(method):
    problem = make_problem()
    kv = get_selection(section(method)).choose(problem, quiet)
    assert kv == get_selection(section(method)).choose(problem, quiet)
    assert len(kv) == BLOCKS - 1
    assert set(kv) <= {SPARSE, KVSend()}
    # 2x of 5 blocks, of which one is gone: 2 whole layers and 2 of 3 rows, 34 of 70 rows
    assert len(sparse_of(kv)) == {"none": 0, "all": BLOCKS - 1}.get(method, 2)
    problem.oracle.with_kv(kv)  # a valid plan


def test_attention_mass_takes_the_layers_with_most_mass():
    problem = make_problem()
    mass = attention_mass(problem.oracle, problem.sequences, PROMPT, 1, 2).prompt_ends
    chosen = get_selection(section("attention-mass")).choose(problem, quiet)
    assert sparse_of(chosen) == sorted(mass.topk(2).indices.tolist())


@pytest.mark.parametrize("queries", ["generated", "prompt"])
def test_the_threshold_takes_every_layer_from_it_on(queries):
    problem = make_problem()
    scores = ByAttention(CUT, queries, threshold=0.5).scores(problem, quiet)
    assert min(scores) > 0
    assert max(scores) < 1
    middle = sorted(scores)[1]
    chosen = ByAttention(CUT, queries, threshold=middle).choose(problem, quiet)
    assert sparse_of(chosen) == [layer for layer, score in enumerate(scores) if score >= middle]
    assert len(sparse_of(chosen)) == BLOCKS - 2


def test_simlayerkv_reads_the_prompt_alone():
    problem = make_problem()
    other = Problem(problem.oracle, torch.cat((problem.sequences[:, :PROMPT], text(5, 10, seed=9)), 1), PROMPT)
    lazy, mass = (ByAttention(CUT, queries, sparse_layers=1) for queries in ("prompt", "generated"))
    assert lazy.scores(problem, quiet) == lazy.scores(other, quiet)
    assert mass.scores(problem, quiet) != mass.scores(other, quiet)


@pytest.mark.parametrize(("prompt", "looking"), [(PROMPT, PROMPT // 2), (100, 32)])
def test_simlayerkv_looks_from_the_prompts_last_32_tokens(monkeypatch, prompt, looking):
    """Of a short prompt from its second half; the last token of the prompt among them."""
    oracle, ids = make_oracle(tiny("Qwen3"), make_plan(decode=(3,))), text(2, prompt + 4)
    shapes, watch = [], attention_masses.watch_attention

    def watched(model, see):
        return watch(model, lambda layer, weights: shapes.append(weights.shape[2:]) or see(layer, weights))

    monkeypatch.setattr(attention_masses, "watch_attention", watched)
    ByAttention(CUT, "prompt", sparse_layers=1).scores(Problem(oracle, ids, prompt), quiet)
    assert set(shapes) == {(looking, prompt)}


def test_random_layers_depend_on_the_seed_alone():
    choices = {AtRandom(CUT, 2).choose(make_problem(seed=seed), quiet) for seed in range(8)}
    assert len(choices) > 1
    assert all(len(sparse_of(kv)) == 2 for kv in choices)


def divergence(problem, kv):
    """Mean KL from the oracle's own whole distributions, sequence by sequence, without the selection's code."""
    total = 0.0
    for ids in problem.sequences:
        rows = []
        for sends in ((KVSend(),) * problem.layers, kv):
            oracle = problem.oracle.with_kv(sends)
            top, logprobs = oracle.top_logprobs(ids[:PROMPT], ids[PROMPT:], VOCABULARY)
            rows.append(torch.zeros_like(logprobs).scatter(1, top, logprobs).double())
        assert torch.equal(rows[0][0], rows[1][0])  # the first token is prefill's: no KV rule changes it
        total += float((rows[0].exp() * (rows[0] - rows[1]))[1:].sum(1).mean())
    return total / len(problem.sequences)


def test_measured_harm_is_close_to_the_best_of_all_choices():
    problem = make_problem()
    every = [CUT.sends(4, {a, b}) for a in range(4) for b in range(a)]
    harms = sorted(divergence(problem, kv) for kv in every)
    harm = divergence(problem, ByMeasuredHarm(CUT, 2).choose(problem, quiet))
    assert harm <= harms[1]
    assert harms[1] < harms[-1]


def test_bad_input_is_refused():
    for method in ("attention-mass", "simlayerkv", "random", "measured-harm"):
        with pytest.raises(UserError, match="sparse_layers is 5 but decode keeps 4 layers; choose at most 4"):
            get_selection(section(method, sparse_layers=5)).choose(make_problem(), quiet)
    problem = make_problem()
    problem.oracle.decode_model.model.norm.weight.data[0] = torch.nan
    with pytest.raises(UserError, match="logits are not numbers"):
        get_selection(section("measured-harm")).choose(problem, quiet)


@pytest.mark.parametrize("method", ["attention-mass", "simlayerkv"])
def test_attention_that_is_not_numbers_ranks_no_layers(method):
    problem = make_problem()
    problem.oracle.decode_model.model.layers[1].self_attn.k_proj.weight.data[0] = torch.nan
    with pytest.raises(UserError, match="attention is not numbers"):
        get_selection(section(method)).choose(problem, quiet)


def test_kvcache_imports_no_transformers():
    code = "import sys, pdtrim_deploy.kvchoice; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
