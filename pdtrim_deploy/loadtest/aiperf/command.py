"""A scenario in aiperf's terms: the file of requests, the options, and one bounded run."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path

import httpx

from pdtrim_deploy.errors import ServingError, UserError
from pdtrim_deploy.loadtest.scenario import Scenario
from pdtrim_deploy.loadtest.schedule import Job
from pdtrim_deploy.local.child import Child

START_S = 240.0  # upper bound for aiperf's own start and end, which take 8 to 45 s here
# As `builtin` does: ignore EOS, decode greedily, and report the token count with each chunk.
BODY = {
    "ignore_eos": True,
    "temperature": 0,
    "stream_options": {"include_usage": True, "continuous_usage_stats": True},
}


def check(scenario: Scenario) -> None:
    """Refuse scenarios that aiperf does not support."""
    if scenario.conversations is not None:
        raise UserError(
            f"scenario {scenario.name}: driver aiperf sends texts that are known beforehand, and a turn of a "
            "conversation holds the answers before it; use --driver builtin"
        )
    if scenario.trace is None and scenario.arrivals.clients and scenario.requests is None:
        raise UserError(
            f"scenario {scenario.name}: driver aiperf sends a list of requests, so arrivals of kind 'concurrency' need "
            f"requests beside duration_s; add it, or use --driver builtin"
        )


def write_requests(folder: Path, jobs: Sequence[Job]) -> None:
    """`requests.jsonl` as a Mooncake trace of literal texts, and `hf/` with a tokenizer.

    aiperf 0.13 loads a tokenizer from a hub or its cache even when it needs none. This one splits at spaces; no
    reported figure uses its counts.
    """
    with (folder / "requests.jsonl").open("w") as file:
        for number, job in enumerate(jobs):
            due = {} if job.due_s is None else {"timestamp": job.due_s * 1e3}
            row = {"session_id": str(number), "text_input": job.prompt, "output_length": job.output_tokens}
            file.write(json.dumps(row | due) + "\n")
    model, revision = folder / "hf" / "hub" / "models--local--words", "0" * 40
    snapshot = model / "snapshots" / revision
    snapshot.mkdir(parents=True)
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text(revision)
    words = {"type": "WordLevel", "vocab": {"[UNK]": 0}, "unk_token": "[UNK]"}
    rest = dict.fromkeys(("normalizer", "post_processor", "decoder"))
    split = {"version": "1.0", "added_tokens": [], "pre_tokenizer": {"type": "WhitespaceSplit"}}
    (snapshot / "tokenizer.json").write_text(json.dumps(split | rest | {"model": words}))
    tokenizer_config = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "[UNK]"}
    (snapshot / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    (snapshot / "config.json").write_text('{"model_type": "llama"}')


def command(aiperf: Path, url: str, model: str, scenario: Scenario, jobs: Sequence[Job], folder: Path) -> list[str]:
    """Open loops and traces are a fixed schedule; a closed loop is a concurrency, cut off by its duration."""
    open_loop = jobs[0].due_s is not None
    options: dict[str, object] = {
        "--model": model,
        "--tokenizer": "local/words",
        "--url": url,
        "--endpoint-type": "completions",
        "--extra-inputs": json.dumps(BODY),
        "--input-file": folder / "requests.jsonl",
        "--custom-dataset-type": "mooncake_trace",
        "--dataset-sampling-strategy": "sequential",
        "--request-timeout-seconds": scenario.deadline_s,
        "--random-seed": scenario.seed,
        "--export-level": "raw",
        "--output-artifact-dir": folder / "out",
        "--ui": "none",
    }
    if not open_loop:
        options |= {"--concurrency": min(scenario.arrivals.clients or 1, len(jobs)), "--request-count": len(jobs)}
        if scenario.duration_s is not None:
            options |= {"--benchmark-duration": scenario.duration_s, "--benchmark-grace-period": scenario.deadline_s}
    flags = ["--streaming", "--use-server-token-count", "--no-gpu-telemetry", "--no-server-metrics"]
    flags.append("--fixed-schedule" if open_loop else "--no-fixed-schedule")
    return [str(aiperf), "profile", *(str(part) for pair in options.items() for part in pair), *flags]


def run(aiperf: Path, url: str, scenario: Scenario, jobs: Sequence[Job], folder: Path) -> None:
    """One run; its records are in `folder`/out. Exit code 1 may also mean that every request failed.

    Raises:
        ServingError: it wrote no records, or took longer than the load and its deadlines can.

    """
    turns = -(-len(jobs) // max(1, scenario.arrivals.clients or 1))  # of a closed loop's client
    longest = (jobs[-1].due_s or 0.0) + scenario.deadline_s * (1 if jobs[-1].due_s is not None else turns)
    if jobs[-1].due_s is None and scenario.duration_s is not None:
        longest = scenario.duration_s + scenario.deadline_s
    environment = os.environ | {"HF_HOME": str(folder / "hf"), "HF_HUB_OFFLINE": "1"}
    with (folder / "aiperf.log").open("w+") as log:
        child = Child(
            command(aiperf, url, served_model(url), scenario, jobs, folder),
            env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True, cwd=folder,
        )  # fmt: skip
        try:
            child.wait(longest + START_S)
        except subprocess.TimeoutExpired:
            raise ServingError(f"aiperf did not end within {longest + START_S:.0f} s") from None
        finally:
            with contextlib.suppress(ProcessLookupError):  # its worker processes too, even after an exception
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
        if not (folder / "out" / "profile_export.jsonl").is_file():
            log.seek(0)
            last_lines = [line.strip() for line in log if line.strip()] or ["no output"]
            raise ServingError(
                f"aiperf ended with exit code {child.returncode} and no records: {' | '.join(last_lines[-5:])}"
            )


def served_model(url: str) -> str:
    """The name of the served model; SGLang accepts any name."""
    try:
        return str(httpx.get(f"{url.rstrip('/')}/v1/models", timeout=10, trust_env=False).json()["data"][0]["id"])
    except (httpx.HTTPError, ValueError, KeyError, IndexError, TypeError):
        return "default"
