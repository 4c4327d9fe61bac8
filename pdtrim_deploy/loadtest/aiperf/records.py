"""aiperf's records (0.13.0) as outcomes.

`profile_export.jsonl` has a line for every request, with `error` where aiperf calls it failed; of the others
`profile_export_raw.jsonl` has every chunk with its time. aiperf calls any stream with some text a success, so whether
an answer is whole is judged here, as `builtin` judges it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pdtrim_deploy.loadtest.base import LoadRun, Outcome
from pdtrim_deploy.loadtest.schedule import Job

# aiperf's names of errors (those of aiohttp) -> our kinds; what has an HTTP status is http_<status>.
KINDS = {
    "TimeoutError": "timeout",
    "ClientConnectorError": "refused",
    "ConnectionRefusedError": "refused",
    "ServerDisconnectedError": "disconnected",
    "ClientPayloadError": "disconnected",
    "ClientOSError": "disconnected",
    "ConnectionResetError": "disconnected",
}


def read(out: Path, jobs: Sequence[Job], every: bool = True) -> LoadRun:
    """Outcomes in the order of `jobs`.

    Args:
        out: aiperf's artifact folder.
        asked: the requests; the session of a record is the place of its request.
        every: whether all must have been sent: one without a record is then a failure `unsent`. Otherwise the load was
            cut off by its duration.

    """
    records = {int(row["metadata"]["conversation_id"]): row for row in _rows(out / "profile_export.jsonl")}
    raw = {int(row["metadata"]["conversation_id"]): row for row in _rows(out / "profile_export_raw.jsonl")}
    started = {number: row["metadata"]["request_start_ns"] / 1e9 for number, row in records.items()}
    delay = {number: at - (jobs[number].due_s or 0.0) for number, at in started.items()}
    first = min(delay.values(), default=0.0)
    outcomes = []
    for number, job in enumerate(jobs):
        if number in records:
            late = delay[number] - first if job.due_s is not None else 0.0
            outcomes.append(_outcome(records[number], raw.get(number), job, late))
        elif every:
            outcomes.append(Outcome("unsent", "aiperf has no record of it"))
    ends = [row["metadata"]["request_end_ns"] / 1e9 for row in records.values()]
    return LoadRun(tuple(outcomes), max(ends) - min(started.values()) if ends else 0.0)


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    """Nothing where there is no file: aiperf writes no raw records when every request failed."""
    if path.is_file():
        with path.open() as lines:
            yield from (json.loads(line) for line in lines)


def _outcome(record: dict[str, Any], raw: dict[str, Any] | None, job: Job, late: float) -> Outcome:
    if error := record.get("error"):
        code, name = error.get("code"), error.get("type") or "error"
        kind = KINDS.get(name) or (f"http_{code}" if code else "error")
        return Outcome(kind, f"{name}: {error.get('message') or ''}"[:300], late=late)
    if record["metadata"].get("was_cancelled"):
        return Outcome("timeout", "cancelled when the load's grace period ended", late=late)
    if raw is None:
        return Outcome("error", "aiperf wrote no raw record of it", late=late)
    return _stream(raw, job.output_tokens, late)


def _stream(raw: dict[str, Any], tokens: int, late: float) -> Outcome:
    """TTFT, gaps and counts of one stream.

    A chunk without usage is one token, until a last one without text says how many there were: sglang-router 0.3.2
    drops `continuous_usage_stats` from requests.
    """
    sent = last = raw["start_perf_ns"]
    ttft, gaps, seen, prompt_tokens, done = 0.0, [], 0, 0, False
    for now, data in ((item["perf_ns"], packet["value"]) for item in raw["responses"] for packet in item["packets"]):
        if data == "[DONE]":
            done = True
            break
        try:
            event = json.loads(data)
        except json.JSONDecodeError as error:
            return Outcome("error", f"unreadable reply: {error!r}", late=late)
        if "error" in event:
            return Outcome("error", str(event["error"])[:300], late=late)
        choices, usage = event.get("choices") or [], event.get("usage") or {}
        if any(choice.get("finish_reason") == "abort" for choice in choices):
            return Outcome("error", "the server aborted the request", late=late)
        prompt_tokens = usage.get("prompt_tokens", prompt_tokens)
        if not choices:
            seen = usage.get("completion_tokens", seen)
            continue
        new = usage.get("completion_tokens", seen + 1) - seen
        if new <= 0:
            continue
        if seen:
            gaps += [(now - last) / 1e9 / new] * new
        else:
            ttft = (now - sent) / 1e9
            gaps += [0.0] * (new - 1)
        seen, last = seen + new, now
    if not done or seen < tokens:
        return Outcome("truncated", f"{seen} of {tokens} tokens, {'with' if done else 'no'} [DONE]", late=late)
    return Outcome(None, "", ttft, tuple(gaps), (last - sent) / 1e9, prompt_tokens, seen, late)
