"""Every family through plan, KV, pruning, healing, genuine SGLang workers and engines: which tests pass.

`make bench-families`: the tests of families on tiny random models of all families, those that `make test` runs on few
among them. benchmarks/results/families.json has what passed; docs/reference/families.md is made from it.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from __results import commit

from pdtrim_deploy.bundle.environment import environment

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "families.json"
RUNS = (
    (
        "not serve",
        "tests/pipeline/test_families.py",
        "tests/pipeline/test_experts.py",
        "tests/pdtrim_builders/test_onnx.py",
    ),
    (
        "serve",
        "tests/integration/test_families.py",
        "tests/models/test_reload.py::test_stages_of_every_family_are_the_same_models_in_both_environments",
        "tests/models/test_reload.py::test_stages_with_linear_attention_are_the_same_models_in_both_environments",
    ),
)


def main() -> None:
    """Exit code 1 where a test fails; what passed is written all the same."""
    with tempfile.TemporaryDirectory() as folder:
        file, codes = Path(folder) / "families.json", list[int]()
        for marker, *tests in RUNS:
            command = [sys.executable, "-m", "pytest", "-m", marker, "--family-results", str(file), *tests]
            codes.append(subprocess.run(command, cwd=ROOT, check=False).returncode)
        rows = json.loads(file.read_text())
    data = {"rows": rows, "environment": environment("make bench-families"), "commit": commit()}
    RESULTS.write_text(json.dumps(data, indent=2) + "\n")
    raise SystemExit(int(any(codes)))


if __name__ == "__main__":
    main()
