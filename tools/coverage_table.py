"""Line coverage of each package by the tests that start no server, in both environments: `make coverage`.

    python tools/coverage_table.py [--out FILE] [TESTS ...]     # of all tests, or of those paths under tests/ alone

Lines that a program of its own runs (a command that a test starts, a build's child, an SGLang worker) are not counted.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("pdtrim_deploy", "builders/pdtrim_builders", "plugins/pdtrim_sglang", "plugins/pdtrim_tensorrt")
# Environment -> its tests, as `make test` runs them.
TESTS = {
    "build": ("tests", "--ignore", "tests/pdtrim_sglang", "--ignore", "tests/docs"),
    "serve": ("tests/pdtrim_sglang", "tests/kvcache/test_gpu.py"),
}


def python(name: str) -> str:
    """An environment's interpreter."""
    return str(ROOT / ".venv" / name / "bin" / "python")


def run(name: str, tests: tuple[str, ...], folder: Path) -> int:
    """Run `tests` under coverage; pytest's exit code. What they cover is a file in `folder`."""
    environment = os.environ | {"COVERAGE_FILE": str(folder / name), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [python(name), "-m", "coverage", "run", f"--source={','.join(SOURCES)}"]
    command += ["-m", "pytest", "-m", "not serve", "-p", "no:cacheprovider", *tests]
    return subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode


def packages(report: dict[str, dict]) -> dict[str, tuple[int, int]]:
    """Lines covered and all lines, by package: the folder under `pdtrim_deploy`, or the package as such."""
    totals: defaultdict[str, list[int]] = defaultdict(lambda: [0, 0])
    for path, file in report["files"].items():
        parts = Path(path).parts
        name = "/".join(parts[:2]) if len(parts) > 2 or parts[0] != "pdtrim_deploy" else parts[0]
        totals[name][0] += file["summary"]["covered_lines"]
        totals[name][1] += file["summary"]["num_statements"]
    return {name: (covered, lines) for name, (covered, lines) in sorted(totals.items()) if lines}


def main() -> None:
    """Run them, print a table; exit code 1 where a test failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tests", nargs="*", help="paths under tests/")
    parser.add_argument("--out", type=Path, help="write the table as JSON too")
    options = parser.parse_args()
    chosen = TESTS
    if options.tests:
        plugin = tuple(test for test in options.tests if test.startswith("tests/pdtrim_sglang"))
        chosen = {"serve": plugin, "build": tuple(test for test in options.tests if test not in plugin)}
    with tempfile.TemporaryDirectory(prefix="pdtrim-coverage-") as name:
        folder = Path(name)
        codes = [run(env, tests, folder) for env, tests in chosen.items() if tests]
        environment = os.environ | {"COVERAGE_FILE": str(folder / "all")}
        files = [str(folder / env) for env in chosen if (folder / env).is_file()]
        for arguments in (["combine", "--quiet", *files], ["json", "--quiet", "-o", str(folder / "report.json")]):
            command = [python("build"), "-m", "coverage", *arguments]
            subprocess.run(command, cwd=ROOT, env=environment, check=True)
        table = packages(json.loads((folder / "report.json").read_text()))
    for package, (covered, lines) in table.items():
        print(f"{package:<32} {covered:>6} of {lines:>6} lines {covered / lines:>7.1%}")
    covered, lines = (sum(row[at] for row in table.values()) for at in (0, 1))
    print(f"{'all':<32} {covered:>6} of {lines:>6} lines {covered / lines:>7.1%}")
    if options.out:
        options.out.write_text(json.dumps(table, indent=1) + "\n")
    sys.exit(1 if any(codes) else 0)


if __name__ == "__main__":
    main()
