"""Bundles with student blocks, compensated and healed weights: what is written, what is made again, what loads."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from tinyfamilies import taking
from tinytext import write_words

from pdtrim_deploy.bundle import Bundle
from pdtrim_deploy.errors import UserError
from pdtrim_deploy.kvcache.key_offsets import KeyOffsets
from pdtrim_deploy.local.cache import Cache
from pdtrim_deploy.models import resolve
from pdtrim_deploy.models.loading import load_model
from pdtrim_deploy.models.oracle import PDOracle
from pdtrim_deploy.models.surgery import keep_blocks
from pdtrim_deploy.pipeline import build, chosen, heal, heal_kv, texts
from pdtrim_deploy.pipeline.build_steps import steps_of
from pdtrim_deploy.pipeline.context import Context
from pdtrim_deploy.plan import STAGES, Distilled, Drop, KVOnly, Stage
from pdtrim_deploy.pruning.compensation.held_out import HeldOut
from pdtrim_deploy.pruning.compensation.norm import Norm
from pdtrim_deploy.pruning.kv_only import fit
from pdtrim_deploy.pruning.pair import StagePair
from pdtrim_deploy.pruning.pd_loss import pd_kl
from pdtrim_deploy.pruning.students.regression import FROZEN
from pdtrim_deploy.pruning.teacher import Teacher
from pdtrim_deploy.recipe import Recipe

CHOSEN = {
    "prefill": {"removed": [4], "pairs": []},
    "decode": {"removed": [4], "pairs": [[1, 2]]},
}
HEALING = {
    "compensation": "least-squares",
    "prefill_steps": 2,
    "decode_steps": 2,
    "learning_rate": 1e-4,
    "sweep": [1.0],
    "batch": 2,
    "sequences": 12,
    "length": 32,
}
IDS = torch.arange(3, 43)
ROOT = Path(__file__).parents[2]


@pytest.fixture
def recipe_of(
    tmp_path: Path, tiny_dir: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Recipe]:
    """A recipe of which the search is known to choose `CHOSEN`."""
    write_words(tmp_path / "text")

    def prune(context: Context) -> set[str]:
        (context.out / "reports").mkdir(exist_ok=True)
        (context.out / chosen.PRUNING).write_text(json.dumps(CHOSEN))
        return {chosen.PRUNING}

    monkeypatch.setattr("pdtrim_deploy.pipeline.steps.prune", prune)

    def make(architecture: str = "LlamaForCausalLM", **sections: object) -> Recipe:
        data = {
            "name": "healed",
            "model": {"source": f"hf:{tiny_dir(architecture)}"},
            "calibration": {"corpus": f"dir:{tmp_path / 'text'}", "sequences": 8, "length": 32},
            "pruning": {"method": "anneal", "prefill_blocks": 1, "decode_blocks": 2, "distil": True},
            "healing": HEALING,
            "evaluation": {"corpus": f"dir:{tmp_path / 'text'}"},
        }
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(data | sections))
        return Recipe.load(path)

    return make


def context_of(recipe: Recipe, bundle: Bundle, cache: Cache) -> Context:
    return Context(recipe, resolve(recipe.model.source, cache), cache, bundle.path, lambda _: None)


@pytest.mark.parametrize("architecture", taking("least-squares", "distil", "training"))
def test_the_bundle_is_what_was_healed_in_memory(
    architecture: str, recipe_of: Callable[..., Recipe], tmp_path: Path, cache: Cache
) -> None:
    from transformers import AutoModelForCausalLM

    recipe = recipe_of(architecture)
    bundle = build(recipe, tmp_path / "b", cache)
    plan, pair = bundle.plan, Distilled(pair=(1, 2), kv_from=1)
    assert plan.decode[1] == plan.decode[2] == pair
    assert plan.prefill[4] == plan.decode[4] == Drop()
    assert plan.decode_layers == (0, 1, 3, 5)
    assert plan.layer_map == (0, 1, 3, 4)
    dense, memory = (
        load_model(resolve(recipe.model.source, cache).path),
        heal.stage_pair(context_of(recipe, bundle, cache)),
    )
    written = [AutoModelForCausalLM.from_pretrained(bundle.stage_dir(stage)).eval() for stage in STAGES]
    from_disk = PDOracle(written[0], written[1], plan).logprobs(IDS[:24], IDS[24:])
    in_memory = PDOracle(memory.stage("prefill"), memory.stage("decode"), plan).logprobs(IDS[:24], IDS[24:])
    torch.testing.assert_close(from_disk, in_memory, rtol=0, atol=2e-5)
    cut = [keep_blocks(dense, plan.layers(stage)) for stage in STAGES]
    assert (from_disk - PDOracle(cut[0], cut[1], plan).logprobs(IDS[:24], IDS[24:])).abs().max() > 0.01
    for model, plain in zip(written, cut, strict=True):  # what makes K and V is the dense model's
        for layer, plain_layer in zip(model.model.layers, plain.model.layers, strict=True):
            kept = [name for name in layer.state_dict() if name.startswith(FROZEN)]
            assert all(torch.equal(layer.state_dict()[name], plain_layer.state_dict()[name]) for name in kept)
    assert (IDS[None] == written[1].generate(IDS[None], max_new_tokens=3)[:, :40]).all()  # plain transformers runs it
    report = json.loads((bundle.path / heal.HEALING).read_text())
    assert report["students"]["1-2"]["error"] < report["students"]["1-2"]["error_drop"]
    assert {stage: done["steps"] for stage, done in report["healing"].items()} == {"prefill": 2, "decode": 2}
    card = (bundle.decode_dir / "README.md").read_text()
    assert "one student block in the place of each of the pairs 1 and 2" in card
    differences = "students of distilled pairs, compensation least-squares"
    differences += ", 2 steps of distillation" * report["healing"]["decode"]["kept"]
    assert f"Weights differ from the base model's: {differences}" in card
    assert "Weights mended on 12 x 32 tokens of" in card
    assert "Students trained on 12 x 32 tokens of" in card
    assert "students of" not in (bundle.prefill_dir / "README.md").read_text()
    assert bundle.verify() == []


def test_prefill_may_give_up_a_block_that_decode_keeps(
    recipe_of: Callable[..., Recipe], tmp_path: Path, cache: Cache
) -> None:
    recipe = recipe_of(healing={"kv_only_blocks": 1, "sequences": 12, "length": 32}, kv={"method": "all", "n_last": 8})
    bundle = build(recipe, tmp_path / "b", cache)
    (layer,), plan = bundle.plan.kv_only_layers, bundle.plan
    block = plan.prefill_layers[layer]
    assert plan.prefill[block] == KVOnly()
    assert plan.decode[block].kind != "drop"
    stages, memory = (
        [load_model(bundle.stage_dir(s)) for s in STAGES],
        heal.stage_pair(context_of(recipe, bundle, cache)),
    )
    assert stages[0].model.layers[layer].mlp.down_proj.weight.abs().sum() == 0
    from_disk = PDOracle(stages[0], stages[1], plan).logprobs(IDS[:24], IDS[24:])
    in_memory = PDOracle(memory.stage("prefill"), memory.stage("decode"), plan).logprobs(IDS[:24], IDS[24:])
    torch.testing.assert_close(from_disk, in_memory, rtol=0, atol=2e-5)
    card = (bundle.prefill_dir / "README.md").read_text()
    assert f"for their K and V alone: {block}" in card
    assert "refitted; what makes K and V of all other blocks are as there" in card


def test_kv_only_blocks_are_trained_by_what_the_pair_predicts(
    recipe_of: Callable[..., Recipe], tmp_path: Path, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Decode is whole; the checkpoints have what training came to, which is not fitted again."""
    for stage in STAGES:
        monkeypatch.setitem(CHOSEN, stage, {"removed": [], "pairs": []})
    healing = {key: HEALING[key] for key in ("compensation", "batch", "length", "sweep")}
    healing |= {"kv_only_blocks": 2, "sequences": 128}
    sections = {"kv": {"method": "all", "n_last": 8}, "pruning": {}}
    fitted = build(recipe_of(healing=healing, **sections), tmp_path / "a", cache)
    recipe = recipe_of(healing=healing | {"prefill_steps": 60, "learning_rate": 3e-3, "batch": 8}, **sections)
    bundle = build(recipe, tmp_path / "b", cache)
    assert bundle.plan == fitted.plan
    report = json.loads((bundle.path / heal.HEALING).read_text())["healing"]["prefill"]
    assert report["kept"]
    context = context_of(recipe, bundle, cache)
    judged = context.calibration(128, 32)[-16:]
    teacher = Teacher.of(context.model, judged, top=10**6)  # all tokens
    losses = [pd_kl(heal.stage_pair(context_of(b.recipe, b, cache)), judged, teacher) for b in (fitted, bundle)]
    assert losses == pytest.approx([report["before"], report["after"]], rel=1e-3)
    state, changed = load_model(bundle.prefill_dir).model.layers.state_dict(), heal.changed(context)["prefill"]
    for layer in bundle.plan.kv_only_layers:
        assert not state[f"{layer}.mlp.down_proj.weight"].any()
        for name in ("input_layernorm", "self_attn.k_proj", "self_attn.v_proj"):
            assert torch.equal(state[f"{layer}.{name}.weight"], changed[layer][f"{name}.weight"])
    assert "60 steps of distillation from the base model by what the pair predicts" in (
        (bundle.prefill_dir / "README.md").read_text()
    )
    same = [(b.path / "decode" / "model.safetensors").read_bytes() for b in (fitted, bundle)]
    assert same[0] == same[1]


@pytest.mark.parametrize("pruned", [True, False])
def test_decode_is_healed_behind_the_kv_that_is_sent(
    pruned: bool, recipe_of: Callable[..., Recipe], tmp_path: Path, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not pruned:
        for stage in STAGES:
            monkeypatch.setitem(CHOSEN, stage, {"removed": [], "pairs": []})
    kv = {"method": "all", "n_first": 2, "n_last": 4, "wire_dtype": "int8"}
    kv |= {"prompt_tokens": 24, "continuation_tokens": 8}
    base = HEALING if pruned else {key: HEALING[key] for key in ("batch", "sequences", "length", "sweep")}
    sections = {"kv": kv} if pruned else {"kv": kv, "pruning": {}}
    base |= {"sequences": 40}  # of which 8 judge
    without = build(recipe_of(healing=base, **sections), tmp_path / "a", cache)
    recipe = recipe_of(healing=base | {"kv_steps": 32, "learning_rate": 1e-3}, **sections)
    bundle = build(recipe, tmp_path / "b", cache)
    assert bundle.plan == without.plan
    assert bundle.plan.key_offsets is not None
    report = json.loads((bundle.path / heal_kv.HEALING_KV).read_text())
    assert report["kept"]
    assert report["after"] < report["before"]
    context = context_of(recipe, bundle, cache)
    models = [load_model(bundle.stage_dir(stage)) for stage in STAGES]
    before = load_model(without.decode_dir)
    ids = context.calibration(40, 24 + 16)[-8:]
    losses = []
    for decode in (before, models[1]):
        oracle = PDOracle(models[0], decode, bundle.plan, KeyOffsets.read(bundle.decode_dir, bundle.plan))
        losses.append(-float(oracle.score(oracle.prefill(ids[:, :24]), ids[:, 24:]).mean()))
    assert losses[0] != losses[1]
    changed = heal_kv.changed(context)
    state = models[1].model.layers[0].state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in changed["decode"][0].items())
    same = [(b.path / "prefill" / "model.safetensors").read_bytes() for b in (without, bundle)]
    assert same[0] == same[1]
    assert (
        "32 steps of distillation from the base model behind prompt KV as it arrives"
        in (bundle.decode_dir / "README.md").read_text()
    )
    assert bundle.verify() == []
    monkeypatch.setattr("pdtrim_deploy.pruning.healing.heal", lambda *_: pytest.fail("made again"))
    assert build(recipe, tmp_path / "c", cache).plan == bundle.plan


def test_keys_and_values_are_fitted_to_what_prefill_became(
    recipe_of: Callable[..., Recipe], tmp_path: Path, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Block 1 is dropped: what compensation makes of block 0 changes the state that block 3, given up, reads."""
    monkeypatch.setattr("pdtrim_deploy.pruning.kv_only.candidates", lambda _: (3,))
    for stage in STAGES:
        monkeypatch.setitem(CHOSEN, stage, {"removed": [1], "pairs": []})
    healing = {"kv_only_blocks": 1, "compensation": "least-squares", "sequences": 12, "length": 32}
    recipe = recipe_of(healing=healing, kv={"method": "all", "n_last": 8})
    context = context_of(recipe, build(recipe, tmp_path / "b", cache), cache)
    pair = heal.stage_pair(context)
    again = fit(pair, context.calibration(12, 32))
    first, second = (fitted.changed["prefill"][3] for fitted in (pair, again))
    for name in ("self_attn.k_proj.weight", "self_attn.v_proj.weight"):
        torch.testing.assert_close(first[name], second[name], rtol=0, atol=1e-5)


def test_what_was_healed_is_not_healed_again(
    recipe_of: Callable[..., Recipe], tmp_path: Path, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = build(recipe_of(), tmp_path / "b", cache)
    monkeypatch.setattr(heal, "_make", lambda *_: pytest.fail("made again"))
    again = build(recipe_of(kv={"method": "all", "n_last": 8}), tmp_path / "b", cache)
    assert again.plan.digest != first.plan.digest
    afresh = build(recipe_of(), tmp_path / "c", cache)
    before, after = (bundle.manifest.files["decode/model.safetensors"] for bundle in (first, afresh))
    assert before == after
    with pytest.raises(pytest.fail.Exception, match="made again"):
        build(recipe_of(healing={**HEALING, "seed": 1}), tmp_path / "b", cache)


def test_other_weights_of_the_same_plan_are_not_what_was_measured(
    recipe_of: Callable[..., Recipe], tmp_path: Path, cache: Cache
) -> None:
    first = build(recipe_of(), tmp_path / "b", cache)
    (first.reports_dir / "eval.json").write_text("{}")
    build(recipe_of(evaluation={"sequences": 3}), tmp_path / "b", cache)
    assert (first.reports_dir / "eval.json").exists()
    second = build(recipe_of(healing={**HEALING, "compensation": "none"}), tmp_path / "b", cache)
    assert second.plan.digest == first.plan.digest
    assert not (first.reports_dir / "eval.json").exists()


class Killed(BaseException):
    pass


def test_a_build_that_is_killed_goes_on_to_the_same_weights(
    recipe_of: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In bfloat16; killed in prefill, in decode and behind the KV that is sent; no step written down is done again."""
    monkeypatch.setattr("pdtrim_deploy.pruning.healing.state._EVERY_S", 0.0)
    monkeypatch.setattr("pdtrim_deploy.pruning.healing.state._SHARE", 0)
    for stage in STAGES:
        monkeypatch.setitem(CHOSEN, stage, {"removed": [4], "pairs": []})
    healing = {key: HEALING[key] for key in ("batch", "sequences", "length", "sweep")} | {"learning_rate": 1e-2}
    recipe = recipe_of(
        healing=healing | {"prefill_steps": 3, "decode_steps": 3, "kv_steps": 3},
        kv={"method": "all", "n_last": 8, "prompt_tokens": 24, "continuation_tokens": 8},
        pruning={"method": "anneal", "prefill_blocks": 1, "decode_blocks": 1},
        model={"source": recipe_of().model.source, "compute_dtype": "bfloat16"},
    )
    whole = build(recipe, tmp_path / "whole", Cache(tmp_path / "a"))
    steps: list[str] = []

    def note(line: str) -> None:
        if ": step " in line:
            steps.append(line.partition(", loss")[0])
            if len(steps) in (2, 6, 10):
                raise Killed

    for _ in range(3):
        with pytest.raises(Killed):
            build(recipe, tmp_path / "killed", Cache(tmp_path / "b"), note)
    killed = build(recipe, tmp_path / "killed", Cache(tmp_path / "b"), note)
    assert len(steps) == 3 * 3 + 3
    assert len(set(steps)) == 2 * 3  # decode's are the same twice
    for stage in STAGES:
        first, second = ((b.path / stage / "model.safetensors").read_bytes() for b in (whole, killed))
        assert first == second
    assert not list((killed.path).glob(".build*"))
    with pytest.raises(UserError, match=r"model\.compute_dtype is float16 but healing's steps train by gradients"):
        recipe.changed("r", "model", compute_dtype="float16")


def test_nothing_half_written(
    recipe_of: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = Cache(tmp_path / "cache")
    with monkeypatch.context() as patched:
        patched.setattr("pdtrim_deploy.pruning.healing.losses.LogitLoss.backward", lambda *_: float("nan"))
        with pytest.raises(UserError, match="healing prefill: the loss is nan at step 0"):
            build(recipe_of(), tmp_path / "b", cache)
    assert not (tmp_path / "b" / heal.HEALING).exists()
    assert not [p for p in (tmp_path / "cache" / "stage-weights").iterdir() if p.is_dir()]
    assert build(recipe_of(), tmp_path / "b", cache).verify() == []


def test_students_alone_need_no_other_text(recipe_of: Callable[..., Recipe], tmp_path: Path, cache: Cache) -> None:
    """The healing section's own default, 64 x 256 tokens, is more than this corpus has."""
    bundle = build(recipe_of(healing={}), tmp_path / "b", cache)
    assert bundle.plan.decode[1] == Distilled(pair=(1, 2), kv_from=1)
    with pytest.raises(UserError, match="tokens"):
        build(recipe_of(healing={"compensation": "norm"}), tmp_path / "b", cache)


@pytest.mark.parametrize("helped", ["prefill", "decode"])
def test_rescaling_is_kept_where_it_helps_on_text_not_fitted(
    helped: Stage, recipe_of: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measured(method: Norm, pair: StagePair, stage: Stage, ids: torch.Tensor) -> HeldOut:
        return HeldOut(5.0, 4.9 if stage == helped else 5.1)

    monkeypatch.setattr("pdtrim_deploy.pruning.compensation.held_out.held_out", measured)
    cache = Cache(tmp_path / "cache")  # its own: the other stage's answer has the same key
    recipe = recipe_of(healing={"compensation": "norm", "sequences": 6, "length": 32})
    bundle = build(recipe, tmp_path / "b", cache)
    report = json.loads((bundle.path / heal.HEALING).read_text())["rescaled"]
    assert {stage: entry["kept"] for stage, entry in report.items()} == {stage: stage == helped for stage in STAGES}
    changed = heal.changed(context_of(recipe, bundle, cache))
    for stage in STAGES:
        last = bundle.plan.layers(stage)[-1]  # behind every gap
        assert (last in changed[stage]) == (stage == helped)
        card = (bundle.path / stage / "README.md").read_text()
        assert ("compensation norm" in card) == (stage == helped)


def test_what_follows_the_choice_of_kv_makes_nothing_before_it_again(recipe_of: Callable[..., Recipe]) -> None:
    def keys(**healing: object) -> dict[str, str]:
        kv = {"method": "all", "n_last": 8}
        return {step.name: step.key for step in steps_of(recipe_of(healing=HEALING | healing, kv=kv), "model")}

    without, with_it, other = keys(), keys(kv_steps=2), keys(learning_rate=1e-3)
    assert {name for name in without if without[name] != with_it[name]} == {"decode"}
    assert {name for name in without if without[name] != other[name]} == {"heal", "select-kv", "prefill", "decode"}


@pytest.mark.parametrize(
    ("section", "change"),
    [("healing", {"fit": "auto"}), ("healing", {"prompt_share": 0.5}), ("pruning", {"baselines": ["cosine"]})],
    ids=["fit", "prompt_share", "baselines"],
)
def test_what_finalists_are_judged_by_makes_the_search_again(
    recipe_of: Callable[..., Recipe], section: str, change: dict
) -> None:
    pruning = {"method": "anneal", "prefill_blocks": 1, "decode_blocks": 2, "finalists": 2}
    healing = {"compensation": "least-squares", "sequences": 12, "length": 32}

    def keys(**changes: dict) -> dict[str, str]:
        sections = {"pruning": pruning | changes.get("pruning", {}), "healing": healing | changes.get("healing", {})}
        return {step.name: step.key for step in steps_of(recipe_of(**sections), "model")}

    before, after = keys(), keys(**{section: change})
    assert before == keys()
    assert [name for name in before if before[name] != after[name]] == [
        "prune",
        "heal",
        "select-kv",
        "prefill",
        "decode",
    ]


@pytest.mark.parametrize("change", [{"fit": "auto"}, {"prompt_share": 0.5}], ids=["fit", "prompt_share"])
def test_a_build_fits_again_by_other_rules_of_least_squares(
    recipe_of: Callable[..., Recipe], tmp_path: Path, cache: Cache, change: dict
) -> None:
    pruning = {"method": "anneal", "prefill_blocks": 1, "decode_blocks": 2, "distil": True}
    healing = {"compensation": "least-squares", "sequences": 8, "length": 32}

    def weights(**rules: object) -> str:
        bundle = build(recipe_of(pruning=pruning, healing=healing | rules), tmp_path / "b", cache)
        return json.loads((bundle.reports_dir / "healing.json").read_text())["weights"]

    before = weights()
    assert weights() == before
    assert weights(**change) != before


def test_fits_read_the_first_sequences_and_training_all(
    recipe_of: Callable[..., Recipe], tmp_path: Path, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many are fitted on as a recipe with so little text has; the rest is for training."""
    notes = list[str]()
    monkeypatch.setitem(CHOSEN, "decode", {"removed": [2, 4], "pairs": []})  # students learn from all text

    def weights(**section: object) -> dict[str, torch.Tensor]:
        healing = {"compensation": "least-squares", "kv_only_blocks": 1, "length": 32} | section
        recipe = recipe_of(pruning={"prefill_blocks": 1, "decode_blocks": 2, "method": "anneal"}, healing=healing)
        bundle = build(recipe, tmp_path / "b", cache, notes.append)
        changed = heal.changed(context_of(recipe, bundle, cache))
        card = (bundle.prefill_dir / "README.md").read_text()
        assert ("fits without gradients on the first 8" in card) == ("fit_sequences" in section)
        return {f"{stage} {b} {n}": t for stage in STAGES for b, ts in changed[stage].items() for n, t in ts.items()}

    few, first, every = (
        weights(sequences=8),
        weights(sequences=16, fit_sequences=8),
        weights(sequences=16),
    )
    assert all(torch.equal(few[name], first[name]) for name in few | first)
    assert any(not torch.equal(few[name], every[name]) for name in few)
    weights(sequences=16, fit_sequences=8, prefill_steps=1, batch=2)
    assert any("KL from the dense model on 4 held-out sequences" in note for note in notes)  # a quarter of 16


def test_recipes_without_it_have_no_such_step(recipe_of: Callable[..., Recipe], tmp_path: Path, cache: Cache) -> None:
    plain = recipe_of(pruning={"prefill_blocks": 1, "decode_blocks": 2}, healing={})
    assert not heal.needed(plain)
    assert heal.needed(recipe_of(pruning={"prefill_blocks": 1, "decode_blocks": 2}))


@pytest.mark.parametrize(
    ("section", "sentence"),
    [
        ({"compensation": "magic"}, "healing.compensation is 'magic'; allowed: none, norm, least-squares"),
        ({"decode_steps": -1}, "healing.decode_steps is -1; allowed: an integer of at least 0"),
        ({"minutes": 0}, "healing.minutes is 0; allowed: a number above 0"),
        ({"epochs": 1}, "healing.epochs is not a known key"),
        ({"seed": 2**64}, "healing.seed is 18446744073709551616; allowed: an integer from 0 to 4611686018427387904"),
    ],
)
def test_bad_sections_are_one_sentence(recipe_of: Callable[..., Recipe], section: dict, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        recipe_of(healing=section)


@pytest.mark.parametrize(
    ("sections", "sentence"),
    [
        ({"pruning": {}, "healing": {"decode_steps": 5}}, "healing is asked for but nothing is pruned"),
        (
            {"students": {"steps": 5}, "pruning": {"decode_blocks": 2}, "healing": {}},
            "students.steps is 5 but pruning.distil is false",
        ),
        ({"healing": {"compensation": "norm", "minutes": 5}}, "healing.minutes is 5 but no steps are asked for"),
        ({"students": {"minutes": 5}}, "students.minutes is 5 but steps is 0"),
        ({"healing": {"compensation": "least-squares", "sequences": 1}}, "healing.sequences is 1; allowed: at least 2"),
        ({"healing": {"kv_only_blocks": 1, "sequences": 1}}, "healing.sequences is 1; allowed: at least 2"),
        ({"healing": {"decode_steps": 5, "sequences": 1}}, "healing.sequences is 1; allowed: at least 2"),
        ({"healing": {"kv_steps": 5}}, "healing.kv_steps is 5 but kv.method is none and all KV travels as it is"),
        ({"healing": {"kv_steps": 5, "sequences": 1}}, "healing.sequences is 1; allowed: at least 2"),
        (
            {"pruning": {"method": "anneal", "decode_blocks": 2, "finalists": 3}, "healing": {}},
            "pruning.finalists is 3 but healing.compensation is none; allowed with finalists: norm or least-squares",
        ),
        (
            {
                "pruning": {"method": "anneal", "decode_blocks": 2, "finalists": 3},
                "healing": {"compensation": "least-squares", "sequences": 6},
            },
            "healing.sequences is 6 but pruning.finalists is 3; allowed with least-squares: at least 7",
        ),
        (
            {"pruning": {"method": "cosine", "decode_blocks": 2, "finalists": 3}},
            "method is cosine, which takes no finalists",
        ),
        ({"healing": {"compensation": "norm", "sequences": 1}}, "healing.sequences is 1; allowed: at least 2"),
        (
            {"pruning": {}, "healing": {"kv_only_blocks": 1, "decode_steps": 5}},
            "healing.decode_steps is 5 but decode loses no block",
        ),
        (
            {"pruning": {"decode_blocks": 2}, "healing": {"prefill_steps": 5}},
            "healing.prefill_steps is 5 but prefill loses no block; allowed: 0, or pruning.prefill_blocks",
        ),
        ({"calibration": {"sequences": 1}, "healing": {}}, "calibration.sequences is 1 but pruning.distil is true"),
        (
            {
                "pruning": {"method": "anneal", "decode_blocks": 2, "distil": True, "finalists": 2},
                "healing": {"compensation": "norm", "sequences": 3},
            },
            "healing.sequences is 3 but pruning.distil is true; allowed with it: at least 4",
        ),
    ],
)
def test_what_cannot_be_done_or_would_do_nothing_is_refused(
    recipe_of: Callable[..., Recipe], sections: dict, sentence: str
) -> None:
    with pytest.raises(UserError, match=sentence):
        recipe_of(**sections)


@pytest.mark.parametrize("unit", sorted((ROOT / "recipes/units/healing").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_units_load(unit: Path, tmp_path: Path) -> None:
    cut = [] if "kv_only_tail" in unit.read_text() else ["pruning/greedy-1-2"]  # healing of a cut prefill has no tail
    parts = (f"units/{part}.yaml" for part in ("model/smollm2", *cut, "kv/first4-last64"))
    include = ", ".join(str(ROOT / "recipes" / part) for part in parts)
    (tmp_path / "r.yaml").write_text(f"name: r\ninclude: [{include}, {unit}]\n")
    recipe = Recipe.load(tmp_path / "r.yaml")
    assert heal.needed(recipe) or recipe.healing.kv_steps


@pytest.mark.parametrize("finalists", [0, 2])
def test_finalists_are_judged_on_text_that_students_have_not_seen(
    finalists: int, recipe_of: Callable[..., Recipe], tmp_path: Path, cache: Cache
) -> None:
    pruning = {"method": "anneal", "decode_blocks": 2, "distil": True, "finalists": finalists}
    recipe = recipe_of(pruning=pruning, healing={"compensation": "norm", "sequences": 7, "length": 32})
    context = Context(recipe, resolve(recipe.model.source, cache), cache, tmp_path, lambda _: None)
    fitted, taught, judged = (text(context) for text in (texts.fitted, texts.taught, texts.judged))
    assert len(fitted) == 7
    assert torch.equal(fitted, torch.cat((taught, judged)) if finalists else taught)
    assert len(judged) == 4
    alone = recipe_of(pruning=pruning | {"finalists": 0}, healing={})
    context = Context(alone, resolve(alone.model.source, cache), cache, tmp_path, lambda _: None)
    assert torch.equal(texts.taught(context), texts.searched(context))
