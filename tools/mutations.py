"""Apply each mutation of tests/mutations/mutations.yaml in a copy of the tree, and say which test caught it.

    python tools/mutations.py [--only TEXT] [--out FILE]     # `make mutations`: 42 of them, minutes

The named tests run once without a mutation, and must pass; then with each mutation. Tests of the plugin run in
.venv/serve, all others in .venv/build. Exit code 1 when no test caught a mutation; 2 when a mutation cannot be applied
or a test fails without one. Uses tracked files as they are in the working tree.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "tests" / "mutations" / "mutations.yaml"
SOURCES = ("pdtrim_deploy", "plugins", "builders")
SERVE_TESTS = "pdtrim_sglang/"  # under tests/: those that run in .venv/serve
PRELOADED = {
    "build": ("pytest", "hypothesis", "torch", "transformers.modeling_utils"),
    "serve": ("pytest", "torch", "sglang.srt.managers.scheduler"),
}
# Reads a file for the output and pytest's arguments from each line of stdin; writes the exit code.
PROGRAM = """
import importlib, json, os, sys
report = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
for name in sys.argv[1:]:
    importlib.import_module(name)
for line in sys.stdin:
    output, arguments = json.loads(line)
    if (pid := os.fork()) == 0:
        file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, 1)
        code = int(sys.modules["pytest"].main(arguments))
        sys.stdout.flush()
        os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), file=report, flush=True)
"""
FAILED = re.compile(r"^(?:FAILED|ERROR) tests/(.+?)(?: - .*)?$", re.MULTILINE)


@dataclass(frozen=True)
class Mutation:
    """One line of one file, changed; `tests` are paths under tests/."""

    old: str
    new: str
    tests: tuple[str, ...]
    file: Path

    def applied(self, tree: Path) -> str:
        """The file's text in `tree`, mutated."""
        return (tree / self.file).read_text().replace(self.old, self.new)


def read(tree: Path) -> list[Mutation]:
    """All mutations with their files; SystemExit names those whose old line is missing or not unique."""
    texts = {
        path.relative_to(tree): path.read_text()
        for folder in SOURCES
        for path in sorted((tree / folder).rglob("*"))
        if path.suffix in (".py", ".cpp", ".cu", ".h")
    }
    mutations, bad = [], []
    for entry in yaml.safe_load(DATA.read_text()):
        places = [path for path, text in texts.items() for _ in range(text.count(entry["old"]))]
        missing = [test for test in entry["tests"] if not (tree / "tests" / test.partition("::")[0]).is_file()]
        if len(places) != 1 or "\n" in entry["old"]:
            where = ", ".join(map(str, places)) or "nowhere"
            bad.append(f"stands in {where}, must be part of one line: {entry['old']}")
        elif missing:
            bad.append(f"no such test: {', '.join(missing)}")
        else:
            mutations.append(Mutation(entry["old"], entry["new"], tuple(entry["tests"]), places[0]))
    if bad:
        print("\n".join(bad), file=sys.stderr)
        sys.exit(2)
    return mutations


def copy_tree(to: Path) -> None:
    """Tracked files, and links to the environments."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, to / name)
    (to / ".venv").symlink_to(ROOT / ".venv")


class Runner:
    """Runs tests of a tree in forks of one process that has imported slow packages, but none of ours."""

    def __init__(self, name: str, tree: Path) -> None:
        # The copy's packages before the installed ones; nothing compiled is kept: its times are too coarse for this.
        paths = os.pathsep.join(str(tree / folder) for folder in (".", "builders", "plugins"))
        environment = os.environ | {
            "PYTHONPATH": paths, "PYTHONDONTWRITEBYTECODE": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        command = [str(ROOT / ".venv" / name / "bin" / "python"), "-c", PROGRAM, *PRELOADED[name]]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        self._process = subprocess.Popen(command, cwd=tree, env=environment, text=True, **pipes)
        self._output = tree / f"{name}.out"

    def failures(self, tests: list[str]) -> list[str]:
        """Tests that fail; a file that cannot even be collected counts as one."""
        arguments = [
            *(f"tests/{test}" for test in tests),
            "-m",
            "not serve",
            "-p",
            "no:cacheprovider",
            "-rfE",
            "--tb=no",
        ]
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([str(self._output), arguments]) + "\n")
        self._process.stdin.flush()
        code = int(self._process.stdout.readline())
        names = FAILED.findall(self._output.read_text())
        return names or ([f"{tests[0]} (pytest ended with {code})"] if code else [])

    def close(self) -> None:
        """End the process."""
        self._process.communicate()


def failures(runners: dict[str, Runner], tree: Path, tests: tuple[str, ...]) -> list[str]:
    """Tests of both environments that fail; an environment's runner is started when first needed."""
    serve = [test for test in tests if test.startswith(SERVE_TESTS)]
    failed = []
    for name, of_part in (("serve", serve), ("build", [test for test in tests if test not in serve])):
        if of_part:
            if name not in runners:
                runners[name] = Runner(name, tree)
            failed += runners[name].failures(of_part)
    return failed


def main() -> None:
    """Run all mutations and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="mutations whose old or new line or tests hold this text")
    parser.add_argument("--out", type=Path, help="write the table as JSON too")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="pdtrim-mutations-") as folder:
        tree = Path(folder)
        copy_tree(tree)
        mutations = [m for m in read(tree) if options.only in "\0".join((m.old, m.new, str(m.file), *m.tests))]
        tests = tuple(sorted({test for mutation in mutations for test in mutation.tests}))
        runners: dict[str, Runner] = {}
        if failed := failures(runners, tree, tests):
            print("without a mutation these fail already:", *failed, sep="\n  ", file=sys.stderr)
            sys.exit(2)
        rows = []
        for mutation in mutations:
            original = (tree / mutation.file).read_text()
            (tree / mutation.file).write_text(mutation.applied(tree))
            caught = failures(runners, tree, mutation.tests)
            (tree / mutation.file).write_text(original)
            rows.append({"file": str(mutation.file), "old": mutation.old, "new": mutation.new, "caught_by": caught})
            print(f"{'caught' if caught else 'MISSED'}  {mutation.file}: {mutation.new}", flush=True)
            for name in caught[:1]:
                print(f"          {name}" + (f" and {len(caught) - 1} more" if caught[1:] else ""), flush=True)
        for runner in runners.values():
            runner.close()
    missed = sum(not row["caught_by"] for row in rows)
    print(f"{len(rows) - missed} of {len(rows)} mutations caught")
    if options.out:
        options.out.write_text(json.dumps(rows, indent=1) + "\n")
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    main()
