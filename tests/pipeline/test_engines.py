"""Engines of a recipe's targets: what a build makes, makes again, goes on without, and says."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml
from commandline import run

from pdtrim_deploy.bundle import Bundle, seal
from pdtrim_deploy.cli import main
from pdtrim_deploy.errors import UserError
from pdtrim_deploy.evaluation.quality import Quality, Score
from pdtrim_deploy.local.cache import Cache
from pdtrim_deploy.pipeline import build, engines
from pdtrim_deploy.pipeline.journal import Journal
from pdtrim_deploy.pipeline.model_card import NOT_MEASURED, refresh_cards
from pdtrim_deploy.pipeline.preview import preview
from pdtrim_deploy.plan import STAGES
from pdtrim_deploy.recipe import Recipe

# Stands for pdtrim_builders where only what becomes of engines matters: `behaviour.json` says what each target does.
STAND_IN = """
import json, os, pathlib, sys
sys.path[:] = json.loads(sys.argv[1])
job = json.loads(pathlib.Path(sys.argv[2]).read_text())
out = pathlib.Path(job["out_dir"])
does = json.loads(pathlib.Path(__file__).with_name("behaviour.json").read_text()).get(job["target"], "build")
answer = {}
if does == "die":
    os.kill(os.getpid(), 9)
if does == "refuse-decode" and out.name == "decode":
    answer = {"refused": f"target {job['target']}: op Gather is missing there"}
else:
    out.mkdir(parents=True, exist_ok=True)
    (out / "engine.bin").write_text(json.dumps(job["options"]))
    result = {"target": job["target"], "stage": out.name, "status": "built", "dtype": "float32", "plan_digest": "x"}
    result |= {"files": {"engine.bin": (out / "engine.bin").stat().st_size}, "checked": ["it is there"]}
    (out / "engine.json").write_text(json.dumps(result))
pathlib.Path(job["answer"]).write_text(json.dumps(answer))
"""
Make = Callable[..., tuple[Bundle, list[str]]]


def folders(*targets: str) -> list[str]:
    return [f"engines/{target}/{stage}" for target in targets for stage in ("prefill", "decode")]


@pytest.fixture(scope="module")
def write(tmp_path_factory: pytest.TempPathFactory, tiny_llama_dir: Path) -> Callable[[dict], Path]:
    folder = tmp_path_factory.mktemp("recipe")

    def recipe(targets: dict) -> Path:
        data = {"name": "tiny", "model": {"source": f"hf:{tiny_llama_dir}"}, "targets": targets}
        (folder / "tiny.yaml").write_text(yaml.safe_dump(data))
        return folder / "tiny.yaml"

    return recipe


@pytest.fixture
def make(write: Callable[[dict], Path], tmp_path: Path, cache: Cache) -> Make:
    """Build `targets` into one bundle; what ran of engines and seal."""

    def run(targets: dict) -> tuple[Bundle, list[str]]:
        recipe, ran = Recipe.load(write(targets)), list[str]()

        @contextmanager
        def show(name: str, done: bool) -> Iterator[None]:
            if not done:
                ran.append(name)
            yield

        would = [name for name, done in preview(recipe, tmp_path / "b", cache).steps.items() if not done]
        bundle = build(recipe, tmp_path / "b", cache, show=show)
        assert bundle.verify() == []
        assert bundle.manifest.failures or [name for name in ran if name != "source"] == would
        return bundle, [name for name in ran if name.startswith("engines/") or name == "seal"]

    return run


@pytest.fixture
def behave(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """behave(onnx="die"): what the stand-in does from now on."""
    script = tmp_path / "stand_in.py"
    script.write_text(STAND_IN)
    monkeypatch.setattr(engines, "BUILDER", (sys.executable, "-S", str(script), json.dumps(sys.path)))

    def behaviour(**by_target: str) -> None:
        (tmp_path / "behaviour.json").write_text(json.dumps({k.replace("_", "-"): v for k, v in by_target.items()}))

    behaviour()
    return behaviour


def test_only_what_changed_is_built_again(make: Make, behave: Callable[..., None]) -> None:
    bundle, ran = make({"onnx": {}, "tensorrt-llm": {}})
    assert ran == [*folders("onnx", "tensorrt-llm"), "seal"]
    assert list(bundle.engines) == folders("onnx", "tensorrt-llm")
    assert make({"onnx": {}, "tensorrt-llm": {}})[1] == []
    assert make({"onnx": {}, "tensorrt-llm": {"max_batch_size": 2}})[1] == [*folders("tensorrt-llm"), "seal"]
    bundle, ran = make({"onnx": {}, "tensorrt-llm": {"max_batch_size": 2}, "tensorrt": None})
    assert ran == [*folders("tensorrt"), "seal"]
    assert list(bundle.engines) == folders("onnx", "tensorrt", "tensorrt-llm")  # in the recipe section's order
    (bundle.path / "engines/onnx/decode/engine.bin").unlink()
    assert make({"onnx": {}, "tensorrt-llm": {"max_batch_size": 2}, "tensorrt": None})[1] == [
        "engines/onnx/decode", "seal"
    ]  # fmt: skip


def test_an_engine_is_built_again_with_the_checkpoint_it_is_of(make: Make, behave: Callable[..., None]) -> None:
    bundle, _ = make({"onnx": {}})
    (bundle.path / "decode/model.safetensors").unlink()
    assert make({"onnx": {}})[1] == ["engines/onnx/decode", "seal"]


def test_a_target_taken_out_of_the_recipe_leaves_the_bundle(make: Make, behave: Callable[..., None]) -> None:
    make({"onnx": {}, "tensorrt-llm": {}})
    bundle, ran = make({"tensorrt-llm": {}})
    assert ran == ["seal"]
    assert [p.name for p in (bundle.path / "engines").iterdir()] == ["tensorrt-llm"]
    bundle, _ = make({})
    assert not (bundle.path / "engines").exists()
    assert Journal(bundle.path).steps.keys() == {"prune", "select-kv", "prefill", "decode"}


def test_a_plugin_library_is_part_of_what_an_engine_depends_on(
    make: Make, behave: Callable[..., None], tmp_path: Path
) -> None:
    library = tmp_path / "lib.so"
    library.write_text("one")
    targets = {"onnx": {}, "tensorrt-rtx": {"plugin_library": str(library)}}
    make(targets)
    assert make(targets)[1] == []
    library.write_text("two")
    assert make(targets)[1] == [*folders("tensorrt-rtx"), "seal"]


def test_one_that_is_killed_is_named_and_the_others_are_built(make: Make, behave: Callable[..., None]) -> None:
    behave(onnx="die")
    bundle, ran = make({"onnx": {}, "tensorrt-llm": {}})
    assert ran == ["engines/onnx/prefill", *folders("tensorrt-llm"), "seal"]  # half a pair serves nobody
    assert list(bundle.engines) == folders("tensorrt-llm")
    (sentence,) = bundle.manifest.failures.values()
    assert sentence.startswith("target onnx: prefill: the build process was killed after ")
    assert "most likely for memory" in sentence
    with pytest.raises(UserError, match=r"its prefill engine could not be built .target onnx: prefill: .* was killed"):
        bundle.engine_dir("onnx", "prefill")
    behave()  # it is tried again, alone
    bundle, ran = make({"onnx": {}, "tensorrt-llm": {}})
    assert ran == [*folders("onnx"), "seal"]
    assert bundle.manifest.failures == {}
    assert bundle.engine_dir("onnx", "prefill") == bundle.path / "engines/onnx/prefill"


def test_a_failure_leaves_no_engine_of_another_plan_behind(make: Make, behave: Callable[..., None]) -> None:
    make({"onnx": {}})
    behave(onnx="refuse-decode")
    bundle, ran = make({"onnx": {"weights": "int8"}})
    assert ran == [*folders("onnx"), "seal"]
    assert bundle.manifest.failures == {"onnx": "target onnx: op Gather is missing there"}
    assert list(bundle.engines) == ["engines/onnx/prefill"]
    assert not (bundle.path / "engines/onnx/decode").exists()


def test_a_stage_that_was_not_tried_is_not_sealed_with_other_options(make: Make, behave: Callable[..., None]) -> None:
    make({"onnx": {}})
    behave(onnx="die")
    bundle, ran = make({"onnx": {"weights": "int8"}})
    assert ran == ["engines/onnx/prefill", "seal"]
    assert list(bundle.engines) == []
    assert not (bundle.path / "engines").exists()
    assert not any(name.startswith("engines/") for name in bundle.manifest.steps)


def measure(bundle: Bundle) -> None:
    """As `eval` leaves it."""
    score = Score(ppl=9.0, nll=2.2, nll_per_sequence=[2.2])
    quality = Quality(
        plan_digest=bundle.plan.digest, text=bundle.recipe.evaluation, corpus_sha256="0", tokens=9, dtype="float32",
        dense=score, pd=score, ratio=1.0, environment={"command": "pdtrim-deploy eval b"},
    )  # fmt: skip
    (bundle.reports_dir / "eval.json").write_text(quality.model_dump_json())
    refresh_cards(bundle.path, quality)
    for name in ("tasks", "fidelity", "compare"):
        (bundle.reports_dir / f"{name}.json").write_text("{}")


def test_what_was_measured_is_kept_while_it_holds(
    make: Make, behave: Callable[..., None], write: Callable[[dict], Path], tmp_path: Path, cache: Cache
) -> None:
    behave(tensorrt_llm="die")
    bundle, _ = make({"onnx": {}, "tensorrt-llm": {}})
    measure(bundle)
    (bundle.reports_dir / "mine").mkdir()
    (bundle.reports_dir / "mine" / "notes.txt").write_text("years of work")
    built = {f"reports/{name}.json" for name in ("pruning", "kv")}

    def left() -> set[str]:
        """And none of it is sealed: it may be measured again."""
        assert {n for n in Bundle.open(bundle.path).manifest.files if n.startswith("reports/")} == built
        names = {p.name for p in bundle.reports_dir.iterdir()} - {name.rpartition("/")[2] for name in built}
        loss = "Perplexity 9.0000" if "eval.json" in names else NOT_MEASURED
        assert all(loss in (bundle.stage_dir(stage) / "README.md").read_text() for stage in STAGES)
        return names

    everything = {"eval.json", "tasks.json", "fidelity.json", "compare.json", "mine"}
    make({"onnx": {}, "tensorrt-llm": {}})  # tried again in vain
    assert left() == everything
    behave()
    make({"onnx": {}, "tensorrt-llm": {}, "tensorrt": None})
    assert left() == everything
    (bundle.decode_dir / "model.safetensors").unlink()
    make({"onnx": {}, "tensorrt-llm": {}})  # the same decode again; an engine that may have been measured is gone
    assert left() == {"eval.json", "tasks.json", "mine"}
    data = yaml.safe_load(write({"onnx": {}}).read_text())
    data["model"]["dtype"] = "bfloat16"
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(data))
    build(Recipe.load(tmp_path / "r.yaml"), bundle.path, cache)
    assert left() == {"mine"}


def test_scratch_of_a_killed_build_is_swept(make: Make, behave: Callable[..., None]) -> None:
    bundle, _ = make({"onnx": {}})
    (bundle.path / "engines/onnx/.prefill.new-abc").mkdir()
    (bundle.path / "engines/onnx/.prefill.new-abc/model.onnx").write_text("half")
    make({"onnx": {}})
    assert sorted(p.name for p in (bundle.path / "engines/onnx").iterdir()) == ["decode", "prefill"]


def test_a_bundle_from_before_there_were_engines_opens(make: Make, behave: Callable[..., None]) -> None:
    bundle, _ = make({})
    text = json.loads((bundle.path / "manifest.json").read_text())
    assert (text.pop("engines"), text.pop("failures")) == ({}, {})
    old = type(bundle.manifest).model_validate(text)
    seal(bundle.path, old)
    opened = Bundle.open(bundle.path)
    assert opened.engines == {}
    with pytest.raises(UserError, match=r"no decode engine for target onnx, the targets built are none; add `onnx:`"):
        opened.engine_dir("onnx", "decode")


def test_calibration_text_reaches_only_those_that_quantise(
    write: Callable[[dict], Path], tmp_path: Path, cache: Cache, behave: Callable[..., None]
) -> None:
    (tmp_path / "text").mkdir()
    for n in range(12):
        (tmp_path / "text" / f"{n}.txt").write_text(f"{n} cats sat on the mat and looked at the moon " * 20)
    path = write({"onnx": {}, "tensorrt-llm": {"quantisation": "fp8"}})
    data = yaml.safe_load(path.read_text())

    def built(sequences: int) -> Bundle:
        data["calibration"] = {"corpus": f"dir:{tmp_path / 'text'}", "sequences": sequences, "length": 16}
        path.write_text(yaml.safe_dump(data))
        return build(Recipe.load(path), tmp_path / "b", cache)

    def prompts(bundle: Bundle, target: str) -> list[str]:
        return json.loads((bundle.engine_dir(target, "decode") / "engine.bin").read_text()).get("prompts", [])

    first = built(2)
    assert (len(prompts(first, "tensorrt-llm")), prompts(first, "onnx")) == (2, [])
    keys = {name: step.key for name, step in built(3).manifest.steps.items()}
    changed = [name for name, step in first.manifest.steps.items() if keys[name] != step.key]
    assert sorted(changed) == sorted(folders("tensorrt-llm"))
    assert len(prompts(Bundle.open(tmp_path / "b"), "tensorrt-llm")) == 3
    (tmp_path / "text").rename(tmp_path / "gone")
    assert built(4).manifest.failures["tensorrt-llm"].startswith("target tensorrt-llm: prefill: ")


@pytest.fixture(scope="module")
def real(write: Callable[[dict], Path], cache: Cache) -> tuple[Path, int, Path]:
    """Built by the command with the real builders: two targets that work here, one that cannot."""
    path = write({"onnx": None, "tensorrt": None, "tensorrt-llm": {"tensor_parallel": [1, 2]}})
    out = path.parent / "bundle"
    with pytest.raises(SystemExit) as ended:
        main(["build", str(path), "--out", str(out), "--cache-dir", str(cache.root)])
    return out, int(ended.value.code or 0), path


def test_the_command(real: tuple[Path, int, Path], cache: Cache, capsys: pytest.CaptureFixture[str]) -> None:
    out, code, path = real
    assert code == 1
    bundle = Bundle.open(out)
    assert bundle.verify() == []
    assert list(bundle.engines) == folders("onnx", "tensorrt-llm")
    engine = bundle.engines["engines/onnx/prefill"]
    assert (engine.state, engine.plan_digest) == ("run", bundle.plan.digest)
    assert (engine.ops["PagedAttention"], engine.ops["SparseKVSend"]) == (6, 6)
    assert engine.numerics is not None
    assert engine.numerics.hidden_error < 5e-5
    assert (engine.peak_memory or 0) > 100e6
    assert bundle.engine_files("engines/onnx/prefill").keys() == {*engine.files, "engine.json"}
    code, printed, err = run(capsys, "build", path, "--out", out, "--cache-dir", cache.root, "--json")
    assert code == 1
    assert err.splitlines()[-1].startswith("pdtrim-deploy: target tensorrt: Python package tensorrt is not inst")
    assert json.loads(printed)["failures"].keys() == {"tensorrt"}


def test_inspect_shows_each_engine(real: tuple[Path, int, Path], capsys: pytest.CaptureFixture[str]) -> None:
    report = json.loads(run(capsys, "inspect", real[0], "--json")[1])
    assert list(report["engines"]) == folders("onnx", "tensorrt-llm")
    first = report["engines"]["engines/onnx/prefill"]
    assert (first["state"], first["run"]) == ("run", "onnxruntime, CPU, in the numerics check")
    sealed = Bundle.open(real[0]).manifest.files["engines/onnx/prefill/model.onnx"]
    assert first["files"]["model.onnx"] == {"size": sealed.size, "sha256": sealed.sha256}
    _, text, _ = run(capsys, "inspect", real[0])
    for part in ("onnx prefill", "6 A, 6 S", "tensorrt-llm decode", "built", "not built: target tensorrt: Python"):
        assert part in text


def test_verify_reads_engines_too(
    real: tuple[Path, int, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(real[0], copy)
    file = copy / "engines/onnx/decode/model.onnx"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    code, printed, _ = run(capsys, "verify", copy)
    assert code == 1
    assert "engines/onnx/decode/model.onnx has SHA-256" in printed
