"""Costs foretold: exact where nothing stops early, an upper bound elsewhere, and sizes of a well-known model."""

import json
from pathlib import Path

import pytest
from searches import BASELINES, spent, stages_of
from tinypd import BLOCKS, make_plan, text, tiny

from pdtrim_deploy.cli.build import print_preview
from pdtrim_deploy.errors import UserError
from pdtrim_deploy.models import resolve
from pdtrim_deploy.models.blockwise import Blockwise
from pdtrim_deploy.models.streaming import stream_model
from pdtrim_deploy.models.weights import ModelSizes
from pdtrim_deploy.pipeline.preview import preview
from pdtrim_deploy.pruning.candidates import find
from pdtrim_deploy.pruning.cost import search_cost
from pdtrim_deploy.pruning.expert_cost import expert_cost
from pdtrim_deploy.pruning.hidden_states import HiddenStates
from pdtrim_deploy.pruning.refit_judge import RefitJudge
from pdtrim_deploy.pruning.search import Settings
from pdtrim_deploy.pruning.search.greedy import Greedy
from pdtrim_deploy.pruning.students import Students
from pdtrim_deploy.recipe import CalibrationSection, Recipe
from pdtrim_deploy.recipe.healing import HealingSection, StudentsSection
from pdtrim_deploy.recipe.pruning import PruningSection
from pdtrim_deploy.recipe.pruning_methods import METHODS


def foretold(model, method, prefill, decode, sequences, length):
    name, work = (method, None) if method in METHODS else ("greedy", BASELINES[method].work)
    section = PruningSection(method=name, prefill_blocks=prefill, decode_blocks=decode)
    text = CalibrationSection(sequences=sequences, length=length)
    return search_cost(model.config.to_dict(), section, text, work=work)


@pytest.mark.parametrize("stages", [(0, 1), (0, 3), (1, 3), (2, 2)])
@pytest.mark.parametrize("family", ["Llama", "Qwen2"])
def test_what_sleb_spends_is_foretold_exactly(family, stages):
    model, ids = tiny(family), text(5, 16)
    result = stages_of(model, ids, *stages, method="sleb")
    cost = foretold(model, "sleb", *stages, 5, 16)
    assert spent(result.prefill, result.decode) == cost.most == cost.likely
    cached = stages_of(model, ids, *stages, method=Greedy(None), protected=frozenset({0, 4}))
    assert cached.decode.removed == result.decode.removed  # the same search, for less
    assert spent(cached.prefill, cached.decode) < cost.most


@pytest.mark.parametrize("method", [*METHODS, "perplexity", "sleb"])
def test_no_search_spends_more_than_foretold(method):
    model, ids = tiny("Llama"), text(6, 20)
    result = stages_of(model, ids, 1, 3, method=method)
    assert 0 < spent(result.prefill, result.decode) <= foretold(model, method, 1, 3, 6, 20).most


@pytest.mark.parametrize("method", ["greedy", "anneal"])
def test_a_search_without_racing_is_priced(method):
    model, ids = tiny("Llama"), text(6, 20)
    steps = {"steps": 20} if method == "anneal" else {}
    result = stages_of(model, ids, 1, 3, method=method, settings=Settings(0, 20, racing=False))
    sizes, calibration = model.config.to_dict(), CalibrationSection(sequences=6, length=20)
    section = PruningSection(method=method, prefill_blocks=1, decode_blocks=3, **steps)
    raced, whole = (
        search_cost(sizes, section.model_copy(update={"racing": racing}), calibration) for racing in (True, False)
    )
    assert spent(result.prefill, result.decode) <= whole.most == whole.likely == raced.most > raced.likely
    assert whole.heads > raced.heads


def test_the_head_is_priced_by_the_part_of_the_vocabulary_that_runs():
    sizes, calibration = tiny("Llama").config.to_dict(), CalibrationSection(sequences=6, length=20)
    small, large = (
        {
            objective: search_cost(
                sizes | {"vocab_size": vocabulary}, PruningSection(decode_blocks=3, objective=objective), calibration
            ).heads
            for objective in ("loss", "kl")
        }
        for vocabulary in (5_000, 500_000)
    )
    assert small["loss"] == small["kl"] == large["kl"] > large["loss"] >= 6 * (2 * 3 + 1)


@pytest.mark.parametrize("stages", [(0, 2), (1, 3), (2, 2)])
@pytest.mark.parametrize("method", ["greedy", "anneal"])
def test_finalists_are_priced(method, stages, monkeypatch):
    """Windows by the search's own count, the judge's by counting blocks that run."""
    model, ids, ran = tiny("Llama"), text(6, 20), []
    block = Blockwise.block
    monkeypatch.setattr(Blockwise, "block", lambda self, *a, **k: ran.append(len(a[1])) or block(self, *a, **k))
    judge = RefitJudge(model, make_plan().model, ids, "least-squares")
    stages_of(model, ids, *stages, method=method, settings=Settings(0, 20), judge=judge, finalists=4)
    more = {"steps": 20} if method == "anneal" else {}
    section = PruningSection(method=method, prefill_blocks=stages[0], decode_blocks=stages[1], finalists=4, **more)
    healing = HealingSection(compensation="least-squares", sequences=12, length=20)  # 6 to judge on
    calibration = CalibrationSection(sequences=6, length=20)
    with_them, without = (search_cost(model.config.to_dict(), section, calibration, h) for h in (healing, None))
    assert without.most < with_them.most
    assert sum(ran) <= with_them.most


def test_a_second_search_of_decode_is_priced(monkeypatch):
    model, ids, ran = tiny("Llama"), text(6, 20), []
    block, really = Blockwise.block, RefitJudge(model, make_plan().model, ids, "least-squares")
    monkeypatch.setattr(Blockwise, "block", lambda self, *a, **k: ran.append(len(a[1])) or block(self, *a, **k))

    def judge(stage, prefill, solutions):
        """Likes any prefill but that of greedy."""
        losses = list(really(stage, prefill, solutions))
        return losses if stage == "decode" else [-float(at) for at in range(len(losses))]

    result = stages_of(model, ids, 2, 4, judge=judge, finalists=2)
    assert {finalist.solution for finalist in result.prefill.finalists} == set(result.decode_losses)
    assert len(result.decode_losses) == 2
    assert result.passed_over
    section = PruningSection(prefill_blocks=2, decode_blocks=4, finalists=2)
    healing = HealingSection(compensation="least-squares", sequences=12, length=20)  # 6 to judge on
    cost = search_cost(model.config.to_dict(), section, CalibrationSection(sequences=6, length=20), healing)
    assert sum(ran) <= cost.most


def test_students_are_priced(monkeypatch, tmp_path):
    model, ids, ran = tiny("Llama"), text(6, 20), []
    block = Blockwise.block
    monkeypatch.setattr(Blockwise, "block", lambda self, *a, **k: ran.append(len(a[1])) or block(self, *a, **k))
    sizes, calibration = model.config.to_dict(), CalibrationSection(sequences=6, length=20)
    section = PruningSection(method="anneal", decode_blocks=1, steps=0, distil=True)
    with_them, without = (search_cost(sizes, section.model_copy(update={"distil": on}), calibration) for on in (1, 0))
    students = Students(model, ids, StudentsSection(), work=tmp_path)
    find(model, ids, -0.9)
    for first in (0, 2):
        students.tensors((first, first + 1))
    assert 0 < sum(ran) <= with_them.most - without.most
    files = (BLOCKS + 1) * 6 * 20 * model.config.hidden_size * 4
    assert with_them.disk - without.disk == files
    inner, hidden = sizes["intermediate_size"], sizes["hidden_size"]
    assert with_them.fitted - without.fitted == 8 * (4 * inner * inner + 3 * inner * hidden)
    assert with_them.flops > without.flops


def test_refitting_finalists_is_priced():
    sizes, calibration = tiny("Llama").config.to_dict(), CalibrationSection(sequences=6, length=20)
    section = PruningSection(prefill_blocks=1, decode_blocks=2, finalists=3)
    squares, norm = (
        search_cost(sizes, section, calibration, HealingSection(compensation=name, sequences=12, length=20))
        for name in ("least-squares", "norm")
    )
    inner, hidden = sizes["intermediate_size"], sizes["hidden_size"]
    equations = 8 * (4 * inner * inner + 3 * inner * hidden)
    assert squares.fitted - norm.fitted == equations + 4 * (3 + 2) * BLOCKS * inner * hidden
    layers = 20 * (3 + 1) * (BLOCKS - 1) + 10 * 3 * (BLOCKS - 2)
    block = (squares.weights // 4 - 97 * hidden * 2) // BLOCKS
    runs = 2 * block * 20 * (squares.likely - norm.likely)
    assert squares.flops - norm.flops - runs == pytest.approx(6 * layers * 2 * inner * (inner + hidden))


def test_an_8b_model_is_priced_by_its_config_alone(tmp_path, cache, capsys):
    (tmp_path / "r.yaml").write_text(
        "name: r\nmodel: {source: 'hf:meta-llama/Llama-3.1-8B', dtype: bfloat16}\n"
        "pruning: {method: anneal, prefill_blocks: 2, decode_blocks: 7, memory_mb: 512}\n"
    )
    result = preview(Recipe.load(tmp_path / "r.yaml"), tmp_path / "out", cache)
    assert result.search.weights == pytest.approx(8030261248 * 4, rel=1e-4)
    assert result.search.states == 512 << 20
    assert result.search.states_wanted == 32 * 16 * 256 * 4096 * 4
    assert result.search_seconds > 0
    print_preview(result, tmp_path / "out", as_json=False)
    out = capsys.readouterr().out
    assert f"{result.search.most:,} block-forwards at most" in out
    assert "no such folder" in out
    print_preview(result, tmp_path / "out", as_json=True)
    assert json.loads(capsys.readouterr().out)["search"]["states"] == 512 << 20


def test_bounds_of_memory_bound_what_is_foretold(cache):
    sizes = tiny("Llama").config.to_dict()
    text = CalibrationSection(sequences=64, length=2048)

    def priced(**bounds):
        return search_cost(sizes, PruningSection(decode_blocks=2, memory_mb=1, **bounds), text)

    whole, bounded = priced(), priced(blocks_in_memory=2, disk_mb=10)
    assert whole.disk == 0
    assert (bounded.states, bounded.disk) == (1 << 20, 10 << 20)
    assert bounded.weights < whole.weights
    assert priced(blocks_in_memory=99).weights == whole.weights


@pytest.mark.parametrize("method", ["greedy", "anneal"])
@pytest.mark.parametrize("memory_mb", [1, 64])
def test_no_more_hidden_states_are_held_than_foretold(method, memory_mb, monkeypatch):
    model, ids, held = tiny("Llama"), text(32, 128), []
    keep = HiddenStates._keep
    monkeypatch.setattr(HiddenStates, "_keep", lambda self, *a: (keep(self, *a), held.append(self.held))[0])
    stages_of(model, ids, 1, 3, method=method, settings=Settings(0, 20), memory=memory_mb << 20)
    steps = {"steps": 20} if method == "anneal" else {}
    section = PruningSection(method=method, prefill_blocks=1, decode_blocks=3, memory_mb=memory_mb, **steps)
    cost = search_cost(model.config.to_dict(), section, CalibrationSection(sequences=32, length=128))
    assert cost.states_wanted / 8 < max(held) <= cost.states
    assert (max(held) > cost.states_wanted) == (memory_mb > 1), "more is kept than one model's states"


def test_a_folder_with_config_json_alone_is_priced_and_too_many_blocks_are_refused(tmp_path, cache, tiny_llama_dir):
    (tmp_path / "config.json").write_text((Path(tiny_llama_dir) / "config.json").read_text())
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"name: r\nmodel: {{source: 'hf:{tmp_path}'}}\npruning: {{decode_blocks: 2}}\n")
    assert preview(Recipe.load(recipe), tmp_path / "out", cache).search.most > 0
    recipe.write_text(f"name: r\nmodel: {{source: 'hf:{tmp_path}'}}\npruning: {{decode_blocks: 6}}\n")
    with pytest.raises(UserError, match="decode_blocks is 6; allowed: at most 5"):
        preview(Recipe.load(recipe), tmp_path / "out", cache)
    recipe.write_text("name: r\nmodel: {source: 'hf:gone'}\npruning: {decode_blocks: 2}\n")
    with pytest.raises(UserError, match="no such folder"):
        preview(Recipe.load(recipe), tmp_path / "out", cache)


QWEN3_235B = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "num_hidden_layers": 94,
    "num_attention_heads": 64,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "moe_intermediate_size": 1536,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "torch_dtype": "bfloat16",
}


def test_a_token_is_priced_with_the_experts_that_it_meets():
    """235B-A22B, whose name has both numbers; a search that streams its blocks fits where the model does not."""
    sizes = ModelSizes.of(QWEN3_235B)
    assert 234e9 < sizes.total < 236e9
    assert 21e9 < sizes.active * sizes.blocks + sizes.ends < 22.5e9
    section = PruningSection(decode_blocks=4, experts={"prefill": 96.0, "decode": 64.0})
    text = CalibrationSection()
    whole, streamed = (
        search_cost(QWEN3_235B, section.model_copy(update={"blocks_in_memory": blocks}), text) for blocks in (None, 1)
    )
    assert whole.flops == streamed.flops < 2 * whole.likely * 256 * 0.3e9
    assert whole.memory > 900e9 > 20e9 > streamed.memory
    assert whole.reads == 0
    assert streamed.reads > 4 * 2 * sizes.block * 94
    ranking = expert_cost(QWEN3_235B, section.model_copy(update={"blocks_in_memory": 1}), text)
    assert ranking.reads == (94 + 94 + 90) * 2 * sizes.block
    assert ranking.memory < 20e9
    for free in ({"decode": 64.0, "method": "random"}, {"prefill": 128.0, "decode": 128.0}):
        assert expert_cost(QWEN3_235B, PruningSection(experts=free), text) is None
    window = search_cost(QWEN3_235B, PruningSection(method="cosine", decode_blocks=4), text)
    assert window.flops < 2 * 1.1 * text.sequences * text.length * (sizes.active * 94 + sizes.ends)


@pytest.mark.parametrize(("method", "stages"), [("greedy", (1, 3)), ("cosine", (0, 2)), ("anneal", (0, 2))])
def test_a_streamed_search_reads_no_more_than_foretold(method, stages, tiny_llama_dir, cache):
    checkpoint = resolve(f"hf:{tiny_llama_dir}", cache)
    streamed, blocks = stream_model(checkpoint, 1)
    more = {"steps": 5} if method == "anneal" else {}
    stages_of(streamed, text(6, 20), *stages, method=method, settings=Settings(0, 5))
    section = PruningSection(
        method=method, prefill_blocks=stages[0], decode_blocks=stages[1], blocks_in_memory=1, **more
    )
    cost = search_cost(checkpoint.config, section, CalibrationSection(sequences=6, length=20))
    assert 0 < blocks.reads * 4 * ModelSizes.of(checkpoint.config).block <= cost.reads


def test_a_model_of_which_the_config_alone_is_here_has_sizes(tmp_path, cache):
    """Stage by stage: blocks and experts that are gone weigh nothing."""
    (tmp_path / "config.json").write_text(json.dumps(QWEN3_235B))
    recipe = tmp_path / "r.yaml"
    experts = "experts: {prefill: 96, decode: 64}"
    recipe.write_text(
        f'name: r\nmodel: {{source: "hf:{tmp_path}", dtype: bfloat16}}\n'
        f"pruning: {{decode_blocks: 4, blocks_in_memory: 1, {experts}}}\n"
    )
    costs = preview(Recipe.load(recipe), tmp_path / "out", cache)
    sizes, expert = ModelSizes.of(QWEN3_235B), 3 * 4096 * 1536
    for stage, blocks, gone in (("prefill", 94, 32), ("decode", 90, 64)):
        weights = blocks * (sizes.block - gone * expert) + sizes.ends
        assert costs.stage_bytes[stage] == pytest.approx(2 * weights, rel=1e-3)
    assert costs.dense_bytes == 2 * 94 * 4 * 128 * 2 * costs.prompt_tokens
    assert costs.experts_seconds > 0
