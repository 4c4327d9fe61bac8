"""The command line as a person or a script meets it: exit codes, one sentence, JSON, no torch where none is needed."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import click
import pytest
import yaml
from answering import answering
from bare_bundle import make_bundle
from commandline import run
from localtasks import write_tasks
from sse_server import Behaviour, serve
from tinytext import write_words

from pdtrim_deploy import __version__
from pdtrim_deploy.bundle import Bundle
from pdtrim_deploy.cli import COMMANDS, cli, main
from pdtrim_deploy.cli.eval_served import _check_plan
from pdtrim_deploy.cli.exit_codes import EXIT_CODES
from pdtrim_deploy.evaluation.generated.endpoint import Endpoint
from pdtrim_deploy.local.cache import Cache
from pdtrim_deploy.local.own_environment import REPO
from pdtrim_deploy.serving.ports import free_ports

WORDS = ("river", "stone", "garden", "window", "paper", "morning", "summer", "walked", "quietly", "toward", "village")
RECIPES = Path(__file__).parents[2] / "recipes"
NOT_IN_CORE = ("torch", "transformers", "safetensors", "gguf", "httpx", "prometheus_client", "sglang")


@pytest.fixture(scope="module")
def recipe_file(tmp_path_factory: pytest.TempPathFactory, tiny_llama_dir: Path) -> Path:
    folder = tmp_path_factory.mktemp("recipe")
    write_words(folder / "text", words=250)
    corpus = f"dir:{folder / 'text'}"
    data = {
        "name": "tiny",
        "model": {"source": f"hf:{tiny_llama_dir}"},
        "calibration": {"corpus": corpus, "sequences": 2, "length": 32},
        "pruning": {"method": "cosine", "prefill_blocks": 1, "decode_blocks": 2},
        "kv": {"method": "all", "n_first": 2, "n_last": 8},
        "evaluation": {"corpus": corpus, "sequences": 3, "prompt_tokens": 40, "continuation_tokens": 8},
    }
    (folder / "tiny.yaml").write_text(yaml.safe_dump(data))
    return folder / "tiny.yaml"


@pytest.fixture(scope="module")
def bundle_dir(recipe_file: Path, cache: Cache) -> Path:
    out = recipe_file.parent / "bundle"
    with pytest.raises(SystemExit) as ended:
        main(["build", str(recipe_file), "--out", str(out), "--cache-dir", str(cache.root)])
    assert ended.value.code == 0
    return out


def without(modules: tuple[str, ...], *args: object) -> subprocess.CompletedProcess[str]:
    """The command line in a Python where importing any of `modules` fails."""
    program = "\n".join(
        [
            "import sys",
            f"sys.modules.update(dict.fromkeys({modules!r}))",
            "from pdtrim_deploy.cli import main",
            f"main({[str(arg) for arg in args]!r})",
        ]
    )
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=250)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "--version") == (0, f"pdtrim-deploy, version {__version__}\n", "")


def test_help_and_reading_commands_need_the_core_only(bundle_dir: Path) -> None:
    for name in COMMANDS:
        assert cli.get_command(cli.make_context("x", [], resilient_parsing=True), name) is not None
    for args in (["--help"], ["demo", "--help"], ["recipe", "validate", RECIPES / "smollm2-demo.yaml"],
                 ["verify", bundle_dir], ["inspect", bundle_dir]):  # fmt: skip
        done = without(NOT_IN_CORE, *args)
        progress = r"verify( \.\.\.|: [\d.]+ s)\n" if args[0] == "verify" else ""
        assert (done.returncode, re.sub(progress, "", done.stderr)) == (0, ""), args


def test_report(bundle_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.html"
    code, out, _ = run(capsys, "report", bundle_dir, "--out", page)
    assert (code, out.strip()) == (0, str(page))
    assert "<svg" in page.read_text()
    assert f"pdtrim-deploy report {bundle_dir}" in page.read_text()
    code, _, err = run(capsys, "report", bundle_dir, "--pareto", tmp_path / "gone.json")
    assert code == 2
    assert "gone.json: no such file" in err


def test_every_command_is_listed_with_a_whole_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "--help")
    assert code == 0
    listed = [line.split()[0] for line in out.splitlines() if re.match(r"  [a-z][a-z-]* {3,}", line)]
    assert listed == list(COMMANDS)
    assert "..." not in out.split("Look before")[1]
    codes = out.split("Exit codes:\n")[1].splitlines()
    assert [int(line.split()[0]) for line in codes if line[2] != " "] == list(EXIT_CODES)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_examples_that_parse(name: str) -> None:
    command = cli.get_command(cli.make_context("x", [], resilient_parsing=True), name)
    assert command is not None
    examples = re.findall(r"^ +pdtrim-deploy (.*)$|\$\(pdtrim-deploy (.*?)\)", command.help or "", re.MULTILINE)
    assert examples
    for match in examples:
        parse(shlex.split(max(match).partition(" > ")[0]))


def parse(words: list[str]) -> None:
    """Parse without running: usage errors are raised."""
    context = cli.make_context("pdtrim-deploy", list(words))
    while isinstance(context.command, click.Group):
        name, command, rest = context.command.resolve_command(context, [*context._protected_args, *context.args])
        assert command is not None
        context = command.make_context(name, rest, parent=context)


def test_completion(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for shell, says in {"bash": "complete -o nosort -F", "zsh": "#compdef pdtrim-deploy", "fish": "complete"}.items():
        code, out, _ = run(capsys, "completion", shell)
        assert code == 0
        assert says in out
    monkeypatch.setenv("_PDTRIM_DEPLOY_COMPLETE", "bash_complete")
    monkeypatch.setenv("COMP_WORDS", "pdtrim-deploy plan --max")
    monkeypatch.setenv("COMP_CWORD", "2")
    assert run(capsys)[1].split() == ["plain,--max-utilisation"]


def test_verbose_shows_where_an_error_comes_from(tmp_path: Path) -> None:
    for flags, traced in (([], False), (["-v"], True)):
        done = without((), *flags, "recipe", "show", tmp_path / "gone.yaml")
        assert done.returncode == 2
        assert ("Traceback" in done.stderr) is traced
        assert done.stderr.splitlines()[-1].startswith("pdtrim-deploy: ")


def test_dry_runs_start_and_write_nothing(
    capsys: pytest.CaptureFixture[str], bundle_dir: Path, recipe_file: Path, tmp_path: Path, cache: Cache
) -> None:
    args = ("serve", bundle_dir, "--prefill", 2, "--serve-python", sys.executable, "--dry-run")
    code, out, _ = run(capsys, *args)
    lines = [shlex.split(line) for line in out.splitlines()]
    assert (code, len(lines)) == (0, 4)
    assert [line[line.index("--disaggregation-mode") + 1] for line in lines[:3]] == ["prefill", "prefill", "decode"]
    assert lines[3].count("--prefill") == 2
    assert list(json.loads(run(capsys, *args, "--json")[1])) == ["prefill-0", "prefill-1", "decode-0", "router"]
    on_gpus = (*args[:2], "--tp-prefill", 2, "--tp-decode", 2, "--device", "cuda", *args[4:])
    lines = [shlex.split(line) for line in run(capsys, *on_gpus)[1].splitlines()]  # for a host that has them
    assert [line[line.index("--base-gpu-id") + 1] for line in lines[:2]] == ["0", "2"]
    lines = run(capsys, *on_gpus, "--tp-decode", 1)[1].splitlines()
    assert [words[words.index("--tp-size") + 1] for words in map(shlex.split, lines[:2])] == ["2", "1"]
    assert run(capsys, *on_gpus, "--tp-decode", 3)[0] == 2
    assert "--worker-args has --tp-size" in run(capsys, *args, "--worker-args", "--tp-size 2")[2]
    code, out, _ = run(capsys, "demo", recipe_file, "--out", tmp_path / "d", "--dry-run", "--cache-dir", cache.root)
    assert code == 0
    assert "nothing is written (--dry-run)" in out
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_of_a_build_writes_what_its_help_says(
    capsys: pytest.CaptureFixture[str], recipe_file: Path, tmp_path: Path
) -> None:
    assert (
        run(capsys, "build", recipe_file, "--out", tmp_path / "b", "--dry-run", "--cache-dir", tmp_path / "c")[0] == 0
    )
    assert [path.name for path in tmp_path.glob("*/*")] == ["fingerprints"]
    assert "write nothing except the digest of the weights" in " ".join(run(capsys, "build", "--help")[1].split())


def test_what_is_not_sealed_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    for text in (run(capsys, "verify", "--help")[1], (RECIPES.parent / "SECURITY.md").read_text()):
        words = " ".join(text.split())
        assert "model cards (" in words
        assert "README.md" in words
        assert "reports added after the build" in words


def test_a_missing_extra_is_named(recipe_file: Path, tmp_path: Path) -> None:
    done = without(("safetensors", "torch", "transformers"), "build", recipe_file, "--out", tmp_path / "b",
                   "--cache-dir", tmp_path / "cache")  # fmt: skip
    assert done.returncode == 2
    assert "install it with: pip install 'pdtrim-deploy[build]'" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["recipe", "show", "gone.yaml"], "gone.yaml: no such recipe file; check the path"),
        (["verify", "gone"], "gone: no such bundle; make it with: pdtrim-deploy build RECIPE --out gone"),
        (["inspect", "gone"], "gone: no such bundle"),
        (["eval", "gone"], "gone: no such bundle"),
        (["loadtest", "gone"], "gone: no such bundle"),
        (["fidelity", "gone", "127.0.0.1:8000"], "127.0.0.1:8000 is not a URL such as http://127.0.0.1:8000"),
        (["loadtest", "http://10.1.2.3:80"], "10.1.2.3 is another machine; give --allow-remote"),
        (
            ["loadtest", "http://127.0.0.1:1", "--driver", "wrk"],
            "load driver 'wrk' is not known; allowed: aiperf",
        ),
        (["build", "gone.yaml", "--out", "x"], "gone.yaml: no such recipe file"),
        (["demo", "gone.yaml", "--out", "x", "--requests", "2"], "--requests 2 are too few to divide among rounds"),
        (["demo", "gone.yaml", "--out", "x", "--rounds", "2"], "--rounds 2 gives no confidence interval"),
        (["demo", "gone.yaml", "--out", "x"], "gone.yaml: no such recipe file"),
        (
            ["demo", "gone.yaml", "--out", "x", "--link", "1Gbps"],
            "--link 1Gbps: the relay that limits the speed reaches 500 Mb/s at most",
        ),
        (["demo", "gone.yaml", "--out", "x", "--link", "fast"], "'fast' is not a link speed"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_sentence_and_code_2(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, args: list[str], says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, *args)
    assert (code, out) == (2, "")
    assert err.startswith("pdtrim-deploy: ")
    assert says in err
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "args", [["biuld"], ["build"], ["loadtest", "http://127.0.0.1:1", "--prompt-tokens", "9-3"], ["build", "--nope"]]
)
def test_wrong_usage_is_code_2(capsys: pytest.CaptureFixture[str], args: list[str]) -> None:
    code, out, err = run(capsys, *args)
    assert (code, out) == (2, "")
    assert "Error: " in err


def test_ctrl_c_is_130(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("pdtrim_deploy.recipe.Recipe.load", interrupted)
    code, out, err = run(capsys, "recipe", "show", "x.yaml")
    assert (code, out.strip()) == (130, "")
    assert err.strip() == "pdtrim-deploy: stopped by Ctrl-C; run the same command again"


def test_ctrl_c_that_a_library_turned_into_its_own_error_is_130_too(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def swallowed(*_: object, **__: object) -> None:
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        raise ImportError("cannot load module more than once per process")  # numpy, whose import is tried again

    monkeypatch.setattr("pdtrim_deploy.recipe.Recipe.load", swallowed)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        code, out, err = run(capsys, "recipe", "show", "x.yaml")
    finally:
        signal.signal(signal.SIGINT, before)
    assert (code, out.strip()) == (130, "")
    assert err.strip() == "pdtrim-deploy: stopped by Ctrl-C; run the same command again"


def test_a_full_disk_is_one_sentence(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, recipe_file: Path, tmp_path: Path
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device", "somewhere")

    monkeypatch.setattr("pdtrim_deploy.local.atomic.os.fsync", full)
    code, _, err = run(capsys, "build", recipe_file, "--out", tmp_path / "b", "--cache-dir", tmp_path / "c")
    assert code == 2
    assert "No space left on device" in err.splitlines()[-1]


@pytest.mark.parametrize(
    "command",
    [("report", "gone", "--out"), ("compare", "gone", "gone", "--out"), ("inspect", "hf:gone", "--picture")],
    ids=lambda command: command[0],
)
def test_where_nothing_can_be_written_is_said_before_the_work(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, command: tuple[str, ...]
) -> None:
    (tmp_path / "file").write_text("")
    os.mkfifo(tmp_path / "pipe")
    for place, says in (
        (tmp_path, f"{command[-1]} {tmp_path} is a folder; name a file in it"),
        (tmp_path / "pipe", "is a device or a pipe, which a file would replace; name another file"),
        (
            tmp_path / "file" / "x" / "y",
            f"{tmp_path / 'file'} is not a folder that you can write to; name another file",
        ),
        (tmp_path / ("x" * 300), "File name too long; fix that"),
    ):
        code, out, err = run(capsys, *command, place)
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert says in err


def test_a_folder_where_a_file_goes_is_one_sentence(
    capsys: pytest.CaptureFixture[str], bundle_dir: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(bundle_dir, tmp_path / "copy")
    (copy / "reports" / "report.html").mkdir(parents=True)
    code, _, err = run(capsys, "report", copy)
    assert code == 2
    assert err.startswith(f"pdtrim-deploy: {copy / 'reports' / 'report.html'}: Is a directory; fix that")


@pytest.mark.parametrize("command", [("eval",), ("eval", "--tasks", "perplexity"), ("fidelity",)], ids=" ".join)
def test_reports_that_cannot_be_written_are_refused_before_anything_is_measured(
    capsys: pytest.CaptureFixture[str], bundle_dir: Path, tmp_path: Path, cache: Cache, command: tuple[str, ...]
) -> None:
    copy = shutil.copytree(bundle_dir, tmp_path / "copy")
    shutil.rmtree(copy / "reports")
    (copy / "reports").write_text("")
    cards = [(copy / stage / "README.md").read_text() for stage in ("prefill", "decode")]
    code, out, err = run(capsys, command[0], copy, *command[1:], "--cache-dir", cache.root)
    assert (code, out) == (2, "")
    assert f"cannot be written: {copy / 'reports'} is not a folder that you can write to" in err
    assert cards == [(copy / stage / "README.md").read_text() for stage in ("prefill", "decode")]


@pytest.mark.parametrize("closed", [">&-", "2>&-"])
def test_a_closed_stream_is_no_error(bundle_dir: Path, closed: str) -> None:
    """A caller without stdout or stderr: Python has None there."""
    for command in ("verify", "inspect"):
        words = shlex.join([sys.executable, "-m", "pdtrim_deploy", command, str(bundle_dir)])
        assert subprocess.run(["sh", "-c", f"{words} {closed}"], capture_output=True, check=False).returncode == 0


def test_a_name_that_is_no_utf8_is_one_sentence(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / os.fsdecode(b"b\xff")).path
    code, out, err = run(capsys, "report", bundle)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "is no UTF-8; rename the file or folder" in err
    assert not (bundle / "reports").exists()


def test_a_stream_that_cannot_show_a_character_blames_no_name(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def prints(*_: object, **__: object) -> None:
        "\u00b1".encode("ascii")

    monkeypatch.setattr(type(cli), "main", prints)
    code, out, err = run(capsys, "doctor")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "'\\xb1' cannot be printed in ascii; set PYTHONIOENCODING=utf-8" in err


def test_brackets_of_a_name_are_shown(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, out, _ = run(capsys, "plan", make_bundle(tmp_path / "run[v2]").path, "--isl", 32, "--osl", 8)
    assert code == 0
    assert " run[v2] " in out.splitlines()[2]


def test_an_address_is_no_bundle(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["loadtest"], ["eval", "--tasks", "gsm8k"], ["compare", "http://127.0.0.1:2"]):
        code, out, err = run(capsys, *arguments, "127.0.0.1:8000")
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert "if it is the address of a running pair, give http://127.0.0.1:8000" in err


def test_a_user_without_a_home_is_told_what_to_set(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe_file: Path
) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("os.getuid", lambda: 2**31 - 7)  # as a container may choose: not in /etc/passwd
    code, out, err = run(capsys, "build", recipe_file, "--out", tmp_path / "b", "--dry-run")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "no home folder for the cache; set HOME, or name a folder with --cache-dir" in err


def test_next_commands_are_for_a_shell(capsys: pytest.CaptureFixture[str], bundle_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "a b"
    code, printed, _ = run(capsys, "deploy", "render", bundle_dir, "--out", out)
    assert (code, shlex.split(printed.splitlines()[-1])) == (0, ["kubectl", "apply", "-k", str(out)])
    more = ("--to", "compose", "--bundle-from", "host:/srv")
    code, printed, _ = run(capsys, "deploy", "render", bundle_dir, "--out", out, *more)
    up = ["docker", "compose", "-f", str(out / "compose.yaml"), "up"]
    assert (code, shlex.split(printed.splitlines()[-1])) == (0, up)


def test_a_reader_that_goes_away_is_no_error(recipe_file: Path) -> None:
    command = f"'{sys.executable}' -m pdtrim_deploy recipe schema | head -c 1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("{", "")


def test_recipe_commands(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, out, _ = run(capsys, "recipe", "show", RECIPES / "smollm2-demo.yaml")
    (tmp_path / "resolved.yaml").write_text(out)
    _, first, _ = run(capsys, "recipe", "show", "--json", RECIPES / "smollm2-demo.yaml")
    _, again, _ = run(capsys, "recipe", "show", "--json", tmp_path / "resolved.yaml")
    assert code == 0
    assert json.loads(first)["digest"] == json.loads(again)["digest"]
    code, out, _ = run(capsys, "recipe", "schema")
    assert json.loads(out)["additionalProperties"] is False
    (tmp_path / "wrong.yaml").write_text("nane: x\n")
    code, out, err = run(capsys, "recipe", "validate", RECIPES / "smollm2-demo.yaml", tmp_path / "wrong.yaml")
    assert code == 2
    assert "smollm2-demo.yaml: ok" in out
    assert "wrong.yaml: " in err
    code, out, _ = run(capsys, "recipe", "validate", "--json", RECIPES / "smollm2-demo.yaml", tmp_path / "wrong.yaml")
    assert code == 2
    assert [result["ok"] for result in json.loads(out)] == [True, False]


def test_build_verify_inspect_eval(capsys: pytest.CaptureFixture[str], bundle_dir: Path, cache: Cache) -> None:
    digest = Bundle.open(bundle_dir).plan.digest
    code, out, _ = run(capsys, "verify", bundle_dir)
    assert code == 0
    assert digest in out
    _, out, _ = run(capsys, "inspect", bundle_dir, "--prompt-tokens", 100, "--json")
    seen = json.loads(out)
    assert seen["digest"] == digest
    row = 2 * 16 * 4  # KV heads x head size x float32
    dense = 6 * 2 * 100 * row
    sizes = {"prompt_tokens": 100, "dense": dense, "dense_every_row": dense, "dense_fp8": dense // 4}
    assert seen["bytes"] == sizes | {"planned": 4 * 2 * 10 * row, "states": 0}
    _, out, _ = run(capsys, "inspect", bundle_dir)
    assert out.count("first 2 + last 8") == 4
    code, out, _ = run(capsys, "eval", bundle_dir, "--seed", 3, "--cache-dir", cache.root, "--json")
    report = json.loads(out)
    assert code == 0
    assert report == json.loads((bundle_dir / "reports" / "eval.json").read_text())
    assert report["ratio"] == pytest.approx(report["pd"]["ppl"] / report["dense"]["ppl"])
    assert report["ratio"] != 1
    assert report["tokens"] == 3 * 8
    assert len(report["documents"]) == 3
    assert report["text"]["seed"] == 3
    assert report["environment"]["command"].startswith(f"pdtrim-deploy eval {bundle_dir} --seed 3")
    code, _, err = run(capsys, "eval", bundle_dir, "--corpus", "news", "--cache-dir", cache.root)
    assert code == 2
    assert (
        "command line: evaluation.corpus is 'news'; allowed: brown, austen, code, questions, agents, recall, dir:PATH"
        in err
    )
    card = (bundle_dir / "decode" / "README.md").read_text()
    assert f"ratio {report['ratio']:.4f}" in card
    assert digest in card
    assert run(capsys, "verify", bundle_dir)[0] == 0  # reports and cards are not sealed


def test_likelihoods_of_a_served_pair_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "eval", "http://127.0.0.1:8000", "--tasks", "lm_eval:hellaswag")
    assert (code, out) == (2, "")
    assert "scores a likelihood's continuation as prompt, so that only prefill would be measured" in err


def test_eval_of_tasks(capsys: pytest.CaptureFixture[str], bundle_dir: Path, cache: Cache) -> None:
    common = ("eval", bundle_dir, "--cache-dir", cache.root)
    code, out, _ = run(capsys, *common, "--tasks", "agreement", "--items", 3, "--seed", 5, "--json")
    report = json.loads(out)
    assert code == 0
    assert report == json.loads((bundle_dir / "reports" / "tasks.json").read_text())
    (task,) = report["tasks"]
    assert (task["task"], len(task["groups"]), report["seed"]) == ("agreement", 3, 5)
    top1 = next(f for f in task["figures"] if f["measure"] == "top1")
    assert top1["dense"] == 1  # the dense model agrees with itself
    assert top1["pd"] == pytest.approx(sum(task["pd"]["top1"]) / 3)
    assert top1["pd"] < 1
    assert top1["difference"] == pytest.approx(top1["pd"] - 1)
    code, out, _ = run(capsys, *common, "--tasks", "agreement", "--items", 1)
    assert code == 0
    assert "agreement, 1 items:\n  top1" in out
    for args, says in (
        (("--tasks", "agreement,speed"), "'speed' is no task; use one of perplexity, choice, needle, agreement"),
        (("--tasks", "needle", "--items", 1), "4 documents give 4 sequences of 1024 tokens, not 10"),
        (("--items", 3), "--items is for tasks; give --tasks too"),
        (("--tasks", "agreement", "--sequences", 3), "with --tasks give --items"),
        (("--tasks", "agreement", "--hand-over", "served"), "are for tasks of lm-eval; give --tasks lm_eval:NAME too"),
        (("--tasks", "lm_eval:x", "--include-path", "nowhere"), "--include-path: nowhere is no folder; name the"),
    ):
        code, out, err = run(capsys, *common, *args)
        assert (code, out) == (2, "")
        assert says in err.splitlines()[-1]
    assert json.loads((bundle_dir / "reports" / "tasks.json").read_text())["tasks"][0]["groups"] == ["512"]


def test_a_gate_that_is_not_kept_is_exit_code_1(
    capsys: pytest.CaptureFixture[str], bundle_dir: Path, recipe_file: Path, cache: Cache, tmp_path: Path
) -> None:
    copy, recipe = tmp_path / "bundle", tmp_path / "gated.yaml"
    shutil.copytree(bundle_dir, copy)
    for gate, code, word in ((0.1, 1, "FAILED"), (99, 0, "passed")):
        recipe.write_text(yaml.safe_dump(yaml.safe_load(recipe_file.read_text()) | {"quality": {"perplexity": gate}}))
        assert run(capsys, "build", recipe, "--out", copy, "--cache-dir", cache.root)[0] == 0
        for stage in ("prefill", "decode"):  # another gate's verdict is none of this
            assert f"| not measured | {gate:g}: not measured |" in (copy / stage / "README.md").read_text()
        ended, out, _ = run(capsys, "eval", copy, "--cache-dir", cache.root)
        assert ended == code
        assert f"gate at most {gate}: {word}" in out
        report = json.loads((copy / "reports" / "eval.json").read_text())
        assert report["recovery"]["recovery"] == pytest.approx(report["ratio"])
        for stage in ("prefill", "decode"):
            card = (copy / stage / "README.md").read_text()
            assert f"at most {gate}: {word} | eval.json |" in card
            assert "not measured |" not in card
        assert run(capsys, "report", copy)[0] == 0
        assert f"at most {gate}: {word}" in (copy / "reports" / "report.html").read_text()
    recipe.write_text(yaml.safe_dump(yaml.safe_load(recipe_file.read_text()) | {"quality": {"speed": 2}}))
    code, _, err = run(capsys, "recipe", "validate", recipe)
    assert code == 2
    assert "'speed' is no task; allowed: perplexity, choice, needle" in err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("http://127.0.0.1:9",), "a URL needs tasks; use --tasks with gsm8k, humaneval"),
        (
            ("http://127.0.0.1:9", "--tasks", "gsm8k", "--against", "http://127.0.0.1:9/"),
            "--against http://127.0.0.1:9/ is the pair itself; give the URL where the dense model is served",
        ),
        (("http://127.0.0.1:9", "--tasks", "needle"), "'needle' is no task of a URL; use --tasks with gsm8k"),
        (("http://127.0.0.1:9", "--tasks", "gsm8k", "--seed", 1), "--seed is for bundles, but http://127.0.0.1:9 is a"),
        (("http://10.0.0.5:9", "--tasks", "gsm8k"), "10.0.0.5 is another machine; give --allow-remote"),
        (("http://127.0.0.1:9", "--tasks", "humaneval", "--questions", "f"), "--questions are gsm8k's"),
        (
            ("http://127.0.0.1:9", "--tasks", "gsm8k", "--memory", "8GB"),
            "--memory is for bundles, but http://127.0.0.1",
        ),
        (("http://127.0.0.1:9", "--tasks", "mmlu", "--lengths", "4096"), "give --tasks ruler or turns too"),
        (("http://127.0.0.1:9", "--tasks", "ruler", "--lengths", "4k"), "'4k' are no numbers of tokens from 1024"),
        (("out/bundle", "--against", "http://127.0.0.1:9"), "--against is for URLs, but out/bundle is a bundle"),
    ],
    ids=["no tasks", "itself", "other task", "seed", "remote", "questions", "memory", "lengths", "length", "bundle"],
)
def test_eval_of_a_url_says_what_is_wrong(
    capsys: pytest.CaptureFixture[str], arguments: tuple[object, ...], says: str
) -> None:
    code, out, err = run(capsys, "eval", *arguments)
    assert (code, out) == (2, "")
    assert says in err


def test_eval_of_a_url_where_nothing_answers_asks_for_no_data(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (port,) = free_ports(1)
    url, empty = f"http://127.0.0.1:{port}", tmp_path / "cache"
    code, out, err = run(capsys, "eval", url, "--tasks", "gsm8k", "--cache-dir", empty)
    assert (code, out) == (1, "")
    assert f"{url} does not answer (" in err
    assert not empty.exists()


def test_prompts_longer_than_the_served_context_are_refused(capsys: pytest.CaptureFixture[str], cache: Cache) -> None:
    bodies: list[dict] = []
    with answering(lambda _: "yes", bodies, context=4096) as url:
        code, out, err = run(
            capsys, "eval", url, "--tasks", "turns", "--lengths", "2048,8192", "--cache-dir", cache.root
        )
    assert (code, out, bodies) == (2, "", [])
    assert f"{url} serves a context of 4096 tokens, and prompts of 8192 were to be sent; give --lengths 2048, or" in err


def test_a_bundle_that_a_url_does_not_serve_is_refused(
    capsys: pytest.CaptureFixture[str], bundle_dir: Path, cache: Cache
) -> None:
    digest, bodies = Bundle.open(bundle_dir).plan.digest, list[dict]()
    with answering(lambda _: "yes", bodies, weight_version="ab" * 32) as url:
        common = ("--tasks", "instructions", "--bundle", bundle_dir, "--cache-dir", cache.root)
        code, out, err = run(capsys, "eval", url, *common)
    assert (code, out, len(bodies)) == (2, "", 1)
    assert f"{url} serves plan {'ab' * 6}, and {bundle_dir} has plan {digest[:12]}; name the bundle" in err
    for version, warned in ((digest, False), ("default", True)):
        with answering(lambda _: "yes", weight_version=version) as url:
            _check_plan(Endpoint.at(url), Bundle.open(bundle_dir))
        assert (f"{url} does not say which plan it serves" in capsys.readouterr().err) == warned


def test_a_served_task_of_a_bundle_is_sent_to_its_url(capsys: pytest.CaptureFixture[str], bundle_dir: Path) -> None:
    code, _, err = run(capsys, "eval", bundle_dir, "--tasks", "lm_eval:")
    assert (code, err.count("lm_eval: names no task of lm-eval; give lm_eval:NAME")) == (2, 1)
    code, _, err = run(capsys, "eval", bundle_dir, "--tasks", "gsm8k")
    assert code == 2
    assert "serve the bundle, and give its URL" in err


@pytest.mark.skipif(not (REPO / ".venv/evals/pdtrim-stamp.json").is_file(), reason="needs make setup-evals")
def test_an_unknown_task_of_lm_eval_is_refused_before_a_model_is_loaded(
    capsys: pytest.CaptureFixture[str], bundle_dir: Path, cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pdtrim_deploy.models.on_devices.load_to_compute", lambda *_, **__: pytest.fail("loaded"))
    arguments = ("--tasks", "lm_eval:tiny_chioce", "--include-path", write_tasks(tmp_path / "tasks"))
    code, out, err = run(capsys, "eval", bundle_dir, "--cache-dir", cache.root, *arguments)
    assert (code, out) == (2, "")
    assert "lm-eval has no task 'tiny_chioce'; see its list" in err.splitlines()[-1]


@pytest.mark.skipif(not (REPO / ".venv/evals/pdtrim-stamp.json").is_file(), reason="needs make setup-evals")
def test_eval_of_a_task_of_lm_eval(
    capsys: pytest.CaptureFixture[str], bundle_dir: Path, cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    arguments = ("--tasks", "lm_eval:tiny_choice", "--include-path", write_tasks(tmp_path / "tasks"), "--items", 4)
    code, out, _ = run(capsys, "eval", bundle_dir, "--cache-dir", cache.root, *arguments, "--json")
    (task,) = json.loads(out)["tasks"]
    assert (code, task["task"], len(task["groups"])) == (0, "lm_eval:tiny_choice", 4)
    totals = {}
    for who in ("dense", "pd"):
        lines = (bundle_dir / "reports" / "lm_eval" / who / "tiny_choice.jsonl").read_text().splitlines()
        samples = sorted(map(json.loads, lines), key=lambda sample: sample["doc_id"])
        assert [sample["acc"] for sample in samples] == task[who]["acc"]
        totals[who] = [[answer[0][0] for answer in sample["resps"]] for sample in samples]
        right = [sample["doc"]["label"] for sample in samples]
        assert task[who]["acc"] == [float(t.index(max(t)) == n) for t, n in zip(totals[who], right, strict=True)]
    assert totals["dense"] != totals["pd"]


@pytest.mark.parametrize(
    ("damage", "code", "says"),
    [
        (lambda b: (b / "plan.json").write_text((b / "plan.json").read_text() + " "), 1, "plan.json has"),
        (lambda b: flip(b / "decode" / "model.safetensors"), 1, "decode/model.safetensors has SHA-256"),
        (lambda b: (b / "prefill" / "tokenizer.json").unlink(), 1, "prefill/tokenizer.json is missing"),
        (lambda b: unlink_behind(b / "prefill" / "tokenizer.json"), 1, "prefill/tokenizer.json is missing"),
        (lambda b: (b / "decode" / "extra.bin").write_text("x"), 1, "decode/extra.bin is not in the manifest"),
        (lambda b: (b / "COMPLETE").unlink(), 2, "not a complete bundle"),
        (lambda b: (b / "COMPLETE").write_text("0" * 64), 2, "manifest.json was changed after COMPLETE"),
        (lambda b: swap_plan(b / "decode" / "config.json"), 2, "decode/config.json was made for plan"),
    ],
    ids=["touched", "flipped", "missing", "dangling", "extra", "incomplete", "marker", "swapped"],
)
def test_damage_is_found(
    capsys: pytest.CaptureFixture[str], bundle_dir: Path, tmp_path: Path, damage, code: int, says: str
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(bundle_dir, copy)
    damage(copy)
    got, out, err = run(capsys, "verify", copy)
    assert got == code
    assert says in out + err


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def unlink_behind(path: Path) -> None:
    """A link whose file is gone, as after a copy without what the links are to."""
    path.unlink()
    path.symlink_to("gone")


def swap_plan(path: Path) -> None:
    config = json.loads(path.read_text())
    config["pdtrim"]["kv"][0]["n_last"] += 1
    path.write_text(json.dumps(config))


def test_loadtest_prints_json_and_fails_loudly(capsys: pytest.CaptureFixture[str]) -> None:
    args = ["--requests", 3, "--concurrency", 2, "--prompt-tokens", "4-6", "--output-tokens", 3]
    with serve(Behaviour(ttft=0.01, itl=0.001)) as url:
        code, out, _ = run(capsys, "loadtest", url, *args, "--json")
        table = run(capsys, "loadtest", url, *args)[1]
    result = json.loads(out)
    assert (code, result["requests"], result["failed"], result["output_tokens"]) == (0, 3, 0, 9)
    assert "TTFT ms" in table
    with serve(Behaviour(status=503)) as url:
        code, out, _ = run(capsys, "loadtest", url, *args)
    assert code == 1
    assert "http_503" in out


def test_what_a_machine_reads_and_dry_runs_of_a_bundle(
    capsys: pytest.CaptureFixture[str], bundle_dir: Path, tmp_path: Path, cache: Cache
) -> None:
    plan, before = Bundle.open(bundle_dir).plan.digest, sorted(bundle_dir.rglob("*"))
    code, out, _ = run(capsys, "report", bundle_dir, "--out", tmp_path / "page.html", "--json")
    assert (code, json.loads(out)["page"], json.loads(out)["plan"]) == (0, str(tmp_path / "page.html"), plan)
    for args in (
        ("eval", bundle_dir, "--seed", 4, "--cache-dir", cache.root),
        ("fidelity", bundle_dir, "--serve-python", sys.executable),
        ("fidelity", bundle_dir, "http://127.0.0.1:1"),
    ):
        code, out, _ = run(capsys, *args, "--dry-run", "--json")
        assert (code, json.loads(out)["plan"]) == (0, plan)
        code, out, _ = run(capsys, *args, "--dry-run")
        assert (code, out.splitlines()[0]) == (0, "nothing is started or written (--dry-run)")
    code, out, _ = run(capsys, "deploy", "render", bundle_dir, "--dry-run")
    kinds = [document["kind"] for document in yaml.safe_load_all(out)]
    assert (code, kinds[0], kinds.count("Deployment")) == (0, "Kustomization", 3)
    code, out, _ = run(capsys, "deploy", "render", bundle_dir, "--dry-run", "--json")
    assert json.loads(out)["plan"] == plan
    for args in ((), ("--dry-run", "--out", tmp_path / "k")):
        code, _, err = run(capsys, "deploy", "render", bundle_dir, *args)
        assert (code, "say where the files go" in err) == (2, True)
    assert sorted(bundle_dir.rglob("*")) == before


def test_verbose_may_stand_after_the_command(tmp_path: Path) -> None:
    done = without((), "recipe", "show", tmp_path / "gone.yaml", "-v")
    assert (done.returncode, "Traceback" in done.stderr) == (2, True)
