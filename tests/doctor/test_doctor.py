"""The doctor: its report on this machine and on one that lacks things, and that it imports nothing heavy."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from commandline import run
from pdtrim_sglang.hook_targets import TARGETS

from pdtrim_deploy.doctor import (
    CheckContext,
    Finding,
    examine,
    first_failures,
    packages,
    programs,
    require,
    resources,
    serving,
)
from pdtrim_deploy.doctor.packages import Package, installed, wanted_version
from pdtrim_deploy.doctor.weights import Weights
from pdtrim_deploy.errors import UserError
from pdtrim_deploy.models.footprint import PROGRAM
from pdtrim_deploy.recipe import Recipe

ROOT = Path(__file__).parents[2]
PLUGINS = ROOT / "plugins"


def named(findings: list[Finding], name: str) -> Finding:
    return next(finding for finding in findings if finding.name == name)


@pytest.fixture
def serve_python(tmp_path: Path) -> Path:
    """Our own Python with a fake SGLang whose sources have only some of the names."""
    site = tmp_path / "site"
    for file, text in {
        "sglang/__init__.py": "",
        "sglang/version.py": "__version__ = '0.6.0'",
        "sglang/srt/disaggregation/utils.py": "def get_kv_class(): ...\nclass TransferBackend: ...",
        "sglang/srt/disaggregation/decode.py": "class DecodePreallocQueue:\n    def _pre_alloc(self): ...",
    }.items():
        (site / file).parent.mkdir(parents=True, exist_ok=True)
        (site / file).write_text(text)
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={site}:{PLUGINS}:{ROOT} exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    return python


def test_every_hook_target_is_looked_for(serve_python: Path) -> None:
    findings = list(serving.SGLang().look(CheckContext(serve_python=serve_python)))
    statuses = {finding.detail.split()[0]: finding.status for finding in findings if finding.name.startswith("hook ")}
    assert statuses["disaggregation.utils.get_kv_class"] == "ok"
    assert statuses["disaggregation.decode.DecodePreallocQueue._pre_alloc"] == "ok"
    assert (
        statuses["disaggregation.decode.DecodePreallocQueue._init_kv_manager"] == "wrong version"
    )  # the class is there
    assert statuses["disaggregation.prefill.PrefillBootstrapQueue.create_sender"] == "wrong version"
    assert set(statuses) == {target.removeprefix("sglang.srt.") for target in TARGETS}
    gone = named(findings, "imports from SGLang")
    assert gone.status == "wrong version"
    assert "sglang.srt.disaggregation.utils.DisaggregationMode" in gone.detail
    assert "disaggregation.utils.TransferBackend" not in gone.detail
    assert named(findings, "sglang").status == "missing"  # its sources are there, its metadata not
    assert "pip install sglang==0.5.23" in str(gone.mend)


def test_a_python_without_the_plugin_is_one_line(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -S -I "$@"\n')
    python.chmod(0o755)
    (line,) = serving.SGLang().look(CheckContext(serve_python=python))
    assert (line.name, line.status) == ("plugin", "missing")
    assert "No module named 'pdtrim_sglang'" in line.detail


def test_versions_are_held_against_the_lock(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "build.txt").write_text("torch==9.9\nrich==1.0\n")
    assert wanted_version("torch", "build", tmp_path) == ("9.9", "make setup")
    version, mend = wanted_version("sglang", "serve", tmp_path)  # no lock names it: the wheel's own pin
    assert version == "0.5.23"
    assert mend == "pip install 'pdtrim-deploy[serve]'"
    monkeypatch.setattr(packages, "wanted_version", lambda *_: ("9.9", "make setup"))
    (line,) = Package("rich", "build").look(CheckContext())
    assert (line.status, line.detail, line.mend) == ("wrong version", f"{installed('rich')}, wanted 9.9", "make setup")
    assert line.needed_by == ()  # it is said, but may well do
    (line,) = Package("no-such-thing", "build", why="nothing").look(CheckContext())
    assert (line.status, line.needed_by) == ("missing", ())


def test_a_recipe_too_large_for_the_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    large, small = (Recipe.load(ROOT / "recipes" / f"{n}.yaml") for n in ("llama-3.1-8b-balanced", "smollm2-demo"))
    needs = resources.needs(large)
    assert needs is not None
    assert needs.disk == pytest.approx(2 * 8.03e9 * 2, rel=0.01)
    prefilled = (
        16 * 512 * (32 * 2048 * 2 + 4 * (6 * 4096 + 3 * 14336 + 3 * 4096 + 2048))
    )  # 16 sequences, KV in bfloat16
    assert needs.build == pytest.approx(PROGRAM + 1.1 * 8.03e9 * 4 + prefilled, rel=0.01)
    monkeypatch.setattr(resources, "memory", lambda: (int(25e9), int(10e9)))
    with pytest.raises(UserError, match=r"cannot build: memory to build: llama-3.1-8b-balanced takes about 3\d\.\d GB"):
        require("build", CheckContext(large, tmp_path))
    require("build", CheckContext(small, tmp_path))
    monkeypatch.setattr(resources.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10**9})())
    with pytest.raises(UserError, match=r"disk: 1\.0 GB free at .*Fix it with: free some space"):
        require("build", CheckContext(small, tmp_path / "not" / "yet"))


def test_a_tail_costs_prefill_its_last_blocks_once_more() -> None:
    """They are loaded as a model of narrow MLPs, with embeddings, as `serving.memory` counts them."""
    plain = Recipe.load(ROOT / "recipes" / "llama-3.1-8b-balanced.yaml").changed("test", "healing", kv_only_blocks=8)
    needs, tailed = (resources.needs(r) for r in (plain, plain.changed("test", "healing", kv_only_tail=128)))
    assert needs is not None
    assert tailed is not None
    block = 4096 * (2 * 4096 + 2 * 1024 + 3 * 16 * 32)  # attention of 32 heads, of which 8 have K and V; MLP
    body = 2 * (8 * block + 1.05e9)  # 8 of 32 blocks, of 8.03e9 weights
    assert tailed.serve - needs.serve == pytest.approx(body, rel=0.01)
    assert tailed.judge - needs.judge == pytest.approx((needs.judge - PROGRAM) / 2 * body / (2 * 8.03e9), rel=0.01)
    assert tailed.disk - needs.disk == pytest.approx(body, rel=0.01)


def test_a_search_bounded_in_memory_needs_no_more(tmp_path: Path) -> None:
    def step_gb(step: str, pruning: str = ", blocks_in_memory: 2", more: str = "") -> float:
        (tmp_path / "r.yaml").write_text(
            "name: r\nmodel: {source: 'hf:meta-llama/Llama-3.1-8B', dtype: bfloat16}\n"
            f"pruning: {{decode_blocks: 4, memory_mb: 512{pruning}}}\n{more}"
        )
        needs = resources.needs(Recipe.load(tmp_path / "r.yaml"))
        assert needs is not None
        assert needs.build == max(cost.peak.host for cost in needs.steps.values())
        return (needs.steps[step].peak.host - PROGRAM) / 1e9

    block, ends, prompt = 0.218, 2 * 128256 * 4096 / 1e9, 2 * 32 * 16 * 128 * 1024 * 4 / 1e9
    batch = (8 * 256 * (6 * 4096 + 3 * 14336) * 4 + 3 * 4 * (1 << 24)) / 1e9  # values of a block, and logits
    screened = 3 * 16 * 256 * 4096 * 4 / 1e9  # last states of candidates whose exact losses may be wanted
    whole_model, running = 1.1 * 8.03 * 4, 0.537 + prompt + batch + screened
    bounded = 4 * (ends + 2 * block) + 14336 * 4096 * 4 / 1e9  # with the tensor that is being read
    assert step_gb("prune", "") == pytest.approx(whole_model + running, rel=0.01)
    assert step_gb("prune") == pytest.approx(bounded + running, rel=0.01)
    fitted, maps = 8 * (4 * 14336**2 + 3 * 14336 * 4096) / 1e9, 4 * 32 * 14336 * 4096 / 1e9
    students = step_gb("prune", ", blocks_in_memory: 2, method: anneal, distil: true")
    assert students == pytest.approx(bounded + running + 4 * 4 * block + fitted, rel=0.01)
    states = (3 * 64 * 256 * 4096 * 4 + 8 * 256 * (6 * 4096 + 3 * 14336) * 4 + 3 * 4 * (1 << 24)) / 1e9
    rescaled, refitted = (
        step_gb("heal", more=f"healing: {{compensation: {name}}}\n") for name in ("norm", "least-squares")
    )
    assert rescaled == pytest.approx(bounded + states, rel=0.01)
    assert refitted == pytest.approx(rescaled + fitted + maps)
    judged = step_gb("prune", ", finalists: 3, method: anneal", "healing: {compensation: least-squares}\n")
    assert judged == pytest.approx(whole_model + running + fitted + 3 * maps, rel=0.01)
    alone = step_gb("heal", more="healing: {kv_only_blocks: 1}\n")
    zeros, ranked = 4 * (4096 * 4096 + 14336 * 4096) / 1e9, 32 * 4 * 256 * 4096 * 4 / 1e9  # a batch without each block
    assert alone == pytest.approx(bounded + states + zeros + ranked, rel=0.01)
    trained = step_gb("heal", more="healing: {decode_steps: 1}\n")
    assert trained == pytest.approx(whole_model + states + 4 * 4 * 28 * block, rel=0.01)
    few, many = (
        step_gb("select-kv", more=f"kv: {{method: budget, reduction: 4.95, sequences: {count}}}\n")
        for count in (16, 4800)
    )
    assert few == many == pytest.approx(bounded + 3.76, rel=0.01)  # of 16 sequences, however many there are


def test_states_training_and_workers_are_counted(tmp_path: Path) -> None:
    def needs(pruning: str = "", more: str = "", workers: int = 0) -> resources.Needs:
        (tmp_path / "r.yaml").write_text(
            "name: r\nmodel: {source: 'hf:meta-llama/Llama-3.1-8B', dtype: bfloat16}\n"
            f"calibration: {{sequences: 64, length: 2048}}\npruning: {{decode_blocks: 4{pruning}}}\n{more}"
        )
        estimate = resources.needs(Recipe.load(tmp_path / "r.yaml"), workers)
        assert estimate is not None
        return estimate

    weights, block, prompt = 8.03e9 * 4, 0.218e9 * 4, 2 * 32 * 64 * 1024 * 1024 * 4
    large = needs(", memory_mb: 20000, disk_mb: 10000")
    batch, screened = 8 * 2048 * (6 * 4096 + 3 * 14336) * 4 + 3 * 4 * (1 << 24), 3 * 64 * 2048 * 4096 * 4
    assert large.build == pytest.approx(PROGRAM + 1.1 * weights + (20000 << 20) + prompt + batch + screened, rel=0.01)
    assert large.steps["prune"].disk - needs(", memory_mb: 20000").steps["prune"].disk == 10000 << 20
    healed = needs(more="healing: {decode_steps: 5}\n")
    optimised, tokens = 4 * 28 * (block - 4 * 2 * 4096 * 1024), 4 * 128  # K and V stay; the prompts' half is prefill's
    kept = 4 * 28 * tokens * (5 * 4096 + 3 * 4096 + 2 * 1024 + 3 * 14336) + 6 * 4 * (1 << 23)
    foretold = PROGRAM + 1.1 * weights + optimised + kept
    assert healed.steps["heal"].peak.host == pytest.approx(foretold, rel=0.01)
    alone, shared = needs(), needs(workers=2)
    assert shared.build - PROGRAM > 3 * weights > alone.build
    recipe = Recipe.load(tmp_path / "r.yaml")
    advice = [resources._more_memory(recipe, "build", 99e9, total * 10**9) for total in (20, 60)]  # 17 GB are prompts'
    assert advice[0] == "build it on a machine with 99.0 GB of memory"
    assert advice[1] == f"{advice[0]}, or block by block with build --memory 54000MB"
    distil = ", method: anneal, distil: true"
    assert needs(distil).steps["prune"].disk - alone.steps["prune"].disk == 33 * 64 * 2048 * 4096 * 4


@pytest.mark.parametrize(
    ("package", "recipe"),
    [
        ("gguf", "model: {source: 'pypi:x'}\n"),
        ("peft", "pruning: {decode_blocks: 1}\nhealing: {decode_steps: 5, method: lora}\n"),
    ],
)
def test_a_package_that_the_recipe_wants_is_needed(
    package: str, recipe: str, tmp_path: Path, tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packages, "installed", lambda name: None if name == package else installed(name))
    plain, wants = tmp_path / "plain.yaml", tmp_path / "wants.yaml"
    model = f"name: r\nmodel: {{source: 'hf:{tiny_llama_dir}'}}\n"
    plain.write_text(f"{model}targets: {{tensorrt-llm: {{quantisation: fp8}}}}\n")
    wants.write_text(("name: r\n" if "model" in recipe else model) + recipe)
    require("build", CheckContext(Recipe.load(plain), tmp_path))
    require("eval", CheckContext(Recipe.load(wants)))
    with pytest.raises(UserError, match=rf"cannot build: {package}: not installed \(.*Fix it with: (make|pip)"):
        require("build", CheckContext(Recipe.load(wants), tmp_path))


def test_parameters_of_shipped_models() -> None:
    for file in (ROOT / "recipes" / "facts").glob("*.json"):
        config = json.loads(file.read_text())
        assert resources.ModelSizes.of(config).total == pytest.approx(config["_facts"]["parameters"], rel=2e-3), (
            file.stem
        )


def test_where_nothing_can_be_written(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file, job = tmp_path / "tiny.yaml", ("doctor", "--for", "build")
    file.write_text("")
    for option in ("--out", "--cache-dir"):
        for place in (file, file / "in" / "it"):
            code, out, _ = run(capsys, *job, option, place)
            assert code == 1
            assert out.splitlines()[-1].startswith("build: cannot run, 1 of ")
            assert f"{file} is no folder" in out
            assert f"name another folder with {option}" in out
    fresh = ("--out", tmp_path / "new" / "b", "--cache-dir", tmp_path / "cache")
    assert run(capsys, *job, *fresh)[0] == 0
    assert [*tmp_path.iterdir()] == [file]
    monkeypatch.setattr("pdtrim_deploy.doctor.places.os.access", lambda place, _: place != tmp_path)
    code, out, _ = run(capsys, *job, *fresh)
    assert (code, out.count(f"{tmp_path} cannot be written to")) == (1, 2)
    assert run(capsys, "doctor", "--for", "serve", *fresh)[1].count("cannot be written") == 0


def test_gpus_are_listed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 'NVIDIA H100, 81559 MiB, 580.1'\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    (line,) = programs.Gpu().look(CheckContext())
    assert (line.name, line.status, line.detail) == ("gpu 0", "ok", "NVIDIA H100, 81559 MiB, 580.1")
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    (line,) = programs.Gpu().look(CheckContext())
    assert (line.status, line.needed_by) == ("missing", ())


def test_aiperf_is_looked_for_where_its_driver_takes_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(programs, "REPO", tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    (line,) = programs.Aiperf().look(CheckContext())
    assert (line.status, line.needed_by) == ("missing", ())
    for version, status in (("0.1.0", "wrong version"), (wanted_version("aiperf", "aiperf")[0], "ok")):
        site = tmp_path / ".venv" / "aiperf" / "lib" / "python3.11" / "site-packages"
        for old in site.glob("*"):
            old.rmdir()
        (site / f"aiperf-{version}.dist-info").mkdir(parents=True)
        (line,) = programs.Aiperf().look(CheckContext())
        assert (line.status, bool(line.mend)) == (status, status != "ok")


def test_without_a_clone_aiperf_is_wanted_as_its_driver_reads_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """An installed wheel has no lock file; the driver refuses every version but one."""
    from pdtrim_deploy.loadtest.aiperf.environment import VERSION

    monkeypatch.setattr(programs, "REPO", tmp_path)
    assert programs.AIPERF == VERSION
    monkeypatch.setenv("PATH", str(tmp_path))
    site = tmp_path / ".venv" / "aiperf" / "lib" / "python3.11" / "site-packages"
    (site / "aiperf-0.14.0.dist-info").mkdir(parents=True)
    (line,) = programs.Aiperf().look(CheckContext())
    assert (line.status, line.mend) == (
        "wrong version",
        f"python3 -m venv .venv/aiperf && .venv/aiperf/bin/pip install aiperf=={VERSION}",
    )


def test_what_judging_takes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    recipe = Recipe.load(ROOT / "recipes" / "smollm2-demo.yaml")
    needs = resources.needs(recipe)
    assert needs is not None
    assert needs.judge == pytest.approx(PROGRAM + 2 * 134.5e6 * 4, rel=0.02)
    halved = recipe.changed("test", "model", compute_dtype="bfloat16")
    judged = [resources.needs(halved, judged_in=dtype) for dtype in (None, "bfloat16", "float32")]
    assert [estimate and estimate.judge for estimate in judged] == pytest.approx(
        [PROGRAM + 2 * 134.5e6 * size for size in (2, 2, 4)], rel=0.02
    )
    monkeypatch.setattr(resources, "memory", lambda: (10**9, 10**9))
    with pytest.raises(UserError, match="cannot eval: memory to eval: smollm2-demo takes about"):
        require("eval", CheckContext(recipe))


def test_every_lack_has_a_mend_and_the_exit_code_follows(
    capsys: pytest.CaptureFixture[str], serve_python: Path
) -> None:
    findings = list(examine(CheckContext(serve_python=serve_python), "demo"))
    assert all(finding.mend for finding in findings if finding.status != "ok")
    assert first_failures(findings, "serve")
    code, out, _ = run(capsys, "doctor", "--serve-python", serve_python, "--json")
    report = json.loads(out)
    assert (code, report["job"], report["can_run"]) == (1, "demo", False)
    assert {line["status"] for line in report["findings"]} >= {"ok", "missing", "wrong version"}
    code, out, _ = run(capsys, "doctor", "--serve-python", serve_python, "--for", "build")
    assert (code, out.splitlines()[-1]) == (0, "build: can run")
    code, out, _ = run(capsys, "doctor", "--serve-python", serve_python, "--for", "serve")
    assert code == 1
    assert out.splitlines()[-1].startswith("serve: cannot run, ")


@pytest.mark.parametrize(
    ("method", "name", "status", "words"),
    [
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "weights", "ok", "FP8 in fp8 format"),
        ({"quant_method": "gptq", "bits": 4}, "model", "missing", "weights quantised by gptq are not read"),
    ],
)
def test_the_format_of_quantised_weights_is_named(
    method: dict[str, object], name: str, status: str, words: str, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    config = json.loads((tiny_llama_dir / "config.json").read_text()) | {"quantization_config": method}
    (tmp_path / "config.json").write_text(json.dumps(config))
    recipe = Recipe.model_validate({"name": "q", "model": {"source": f"hf:{tmp_path}"}})
    finding = named(list(Weights().look(CheckContext(recipe=recipe, out=tmp_path))), name)
    assert finding.status == status
    assert words in finding.detail
    unquantised = Recipe.model_validate({"name": "q", "model": {"source": f"hf:{tiny_llama_dir}"}})
    (line,) = Weights().look(CheckContext(recipe=unquantised, out=tmp_path))
    assert (line.name, line.status) == ("model", "ok")


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("hf:{}/gone", "gone: no such folder"),
        ("hf:{}", "config.json"),
        ("gguf:{}/gone.gguf", "gone.gguf: no such file"),
    ],
)
def test_a_model_that_is_not_there_is_missing(
    source: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"name: r\nmodel: {{source: '{source.format(tmp_path)}'}}\n")
    (line,) = Weights().look(CheckContext(recipe=Recipe.load(recipe)))
    assert (line.name, line.status) == ("model", "missing")
    assert words in line.detail
    code, out, _ = run(capsys, "doctor", recipe, "--for", "build", "--out", tmp_path / "b")
    assert (code, out.splitlines()[-1].partition(",")[0]) == (1, "build: cannot run")


def test_the_main_process_imports_nothing_heavy() -> None:
    heavy = ("torch", "transformers", "safetensors", "sglang", "httpx", "prometheus_client", "pdtrim_sglang")
    program = f"import sys\nsys.modules.update(dict.fromkeys({heavy!r}))\nfrom pdtrim_deploy.cli import main\nmain()"
    command = [sys.executable, "-c", program, "doctor", "--for", "build", str(ROOT / "recipes" / "smollm2-demo.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=250)
    assert (done.returncode, done.stderr) == (0, "")
    assert "memory to build" in done.stdout
    assert "time of operations is not known here: torch is not installed" in done.stdout


@pytest.mark.parametrize("printed", ["head -c 99 /dev/urandom", "echo 5", "true", "echo wrong >&2"])
def test_a_program_that_is_no_python_is_one_finding(tmp_path: Path, printed: str) -> None:
    program = tmp_path / "program"
    program.write_text(f"#!/bin/sh\n{printed}\n")
    program.chmod(0o755)
    (finding,) = serving.SGLang().look(CheckContext(serve_python=program))
    assert finding.status == "missing"
    assert finding.detail.startswith(f"pdtrim_sglang.diagnosis does not run in {program}: ")
    assert finding.detail.endswith("wrong" if "wrong" in printed else "it printed nothing")
