"""One engine in a process of its own: `python -m pdtrim_builders JOB.json`, as `pdtrim-deploy build` starts it.

The job: target, stage_dir, out_dir, options, answer, notes. Writes to `answer` the engine's result, or
`{"refused": ...}` with one sentence that names the target; meanwhile to `notes` what goes on, line by line.
"""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path

from pdtrim_builders.registry import build_target
from pdtrim_deploy.errors import UserError
from pdtrim_deploy.local.job import most_memory


def main() -> None:
    """Run the job that argv names."""
    job = json.loads(Path(sys.argv[1]).read_text())
    for name in ("pdtrim_builders", "pdtrim_deploy"):
        logging.getLogger(name).setLevel(logging.INFO)
        logging.getLogger(name).addHandler(logging.FileHandler(job["notes"]))
    try:
        build_target(job["target"], Path(job["stage_dir"]), Path(job["out_dir"]), job["options"], most_memory)
        answer = {}
    except UserError as error:
        answer = {"refused": str(error)}
    Path(job["answer"]).write_text(json.dumps(answer))


if __name__ == "__main__":
    main()
