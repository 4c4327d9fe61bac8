"""Turns of a conversation with decode's radix cache and without it -> results/conversation.json.

`make bench-conversation`.

Two pairs of one bundle (SmolLM2, all rows in k4v3) are up at once and have the same conversations in turns, one turn at
a time, KV over a relay on loopback that lets `--link` through. For each turn: the prompt, the bytes that prefill sent,
TTFT. Bytes are counted by the prefill workers; without the cache they must be the plan's.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from __built import built
from __results import write

from pdtrim_deploy.bundle import Bundle
from pdtrim_deploy.loadtest import Scenario, Workers
from pdtrim_deploy.loadtest.base import Outcome
from pdtrim_deploy.loadtest.builtin import drive
from pdtrim_deploy.loadtest.rounds import LEAST_ROUNDS, Ratio
from pdtrim_deploy.loadtest.scenario import Arrivals, Conversations, Lengths, Prefixes
from pdtrim_deploy.plan.link import Link
from pdtrim_deploy.recipe import Recipe
from pdtrim_deploy.serving import WorkerOptions, cluster_of, throttled
from pdtrim_deploy.serving.spec import SMALL_POOL_TOKENS

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "out" / "bench-conversation"
PAIRS = {"whole": (), "reuse": ("--disaggregation-decode-enable-radix-cache",)}


@dataclass
class Pair:
    """A running pair; `turns` are its outcomes, each with the payload bytes sent for it."""

    url: str
    workers: Workers
    turns: list[tuple[Outcome, int]] = field(default_factory=list)

    def converse(self, scenario: Scenario) -> None:
        """Drive one conversation."""
        before = self.workers.read()

        def ended(outcome: Outcome) -> None:
            nonlocal before
            if outcome.failure is not None:
                raise SystemExit(f"turn {outcome.turn} failed: {outcome.failure}, {outcome.detail}")
            added = self.workers.since(before, 1)
            self.turns.append((outcome, int(added["pdtrim_kv_payload_bytes_sum", ""])))
            before = self.workers.read()

        drive(self.url, scenario, ended)

    def of(self, turn: int) -> list[tuple[Outcome, int]]:
        """That turn of every conversation."""
        return [(outcome, sent) for outcome, sent in self.turns if outcome.turn == turn]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--rounds", type=int, default=6, help=f"conversations; fewer than {LEAST_ROUNDS} are a trial: nothing written"
    )
    parser.add_argument("--turns", type=int, default=8)
    parser.add_argument("--system", type=int, default=400, help="tokens of the system prompt that all share")
    parser.add_argument("--input", type=int, default=250, help="tokens that each turn adds")
    parser.add_argument("--answer", type=int, default=24, help="tokens")
    parser.add_argument("--link", default="100Mbps")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rows = measure(uniform("smollm2", OUT), _scenario(options), SMALL_POOL_TOKENS, options)
    if options.rounds >= LEAST_ROUNDS:
        print(write("conversation", options, rows))


def measure(bundle: Bundle, scenario: Scenario, pool: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each turn of `scenario`, one conversation, over `options.rounds` of them; `pool`: tokens of each."""
    turns = scenario.requests or 0
    with ExitStack() as stack:
        pairs = {}
        for name, arguments in PAIRS.items():
            small = WorkerOptions.beside_others(decode_args=arguments)
            cluster = cluster_of(bundle, options=replace(small, max_total_tokens=pool), say=print)
            stack.enter_context(throttled(cluster, Link.parse(options.link)))
            pairs[name] = Pair(cluster.url, Workers.of(cluster))
        for pair in pairs.values():  # the system prompt is in both caches of prefill before anything is measured
            drive(pair.url, scenario.changed(seed=options.seed + options.rounds, requests=1))
        time.sleep(5)
        busy = round(os.getloadavg()[0], 1)
        for number in range(options.rounds):
            for name in list(pairs) if number % 2 == 0 else list(pairs)[::-1]:
                print(f"conversation {number + 1} of {options.rounds}, {name}")
                pairs[name].converse(scenario.changed(seed=options.seed + number))
    rows = [_row(bundle, turn, pairs, busy) for turn in range(turns)]
    for row in rows:
        print("turn {turn}: {prompt_tokens} tokens, {whole_bytes} -> {reuse_bytes} bytes".format(**row), end="")
        print(", TTFT {whole_ttft_ms:.0f} -> {reuse_ttft_ms:.0f} ms".format(**row))
    return rows


def _scenario(options: argparse.Namespace) -> Scenario:
    """One conversation, of one client."""
    return Scenario(
        name="conversation", arrivals=Arrivals(clients=1), prefixes=Prefixes(tokens=options.system),
        conversations=Conversations(turns=options.turns), input=Lengths(tokens=options.input),
        output=Lengths(tokens=options.answer), requests=options.turns, warmup=0,
    )  # fmt: skip


def _row(bundle: Bundle, turn: int, pairs: dict[str, Pair], busy: float) -> dict[str, Any]:
    whole, reuse = (pairs[name].of(turn) for name in PAIRS)
    planned = [bundle.plan.payload_bytes(outcome.prompt_tokens) for outcome, _ in whole]
    if (sent := [sent for _, sent in whole]) != planned:
        raise SystemExit(f"turn {turn}: {sent} bytes were sent, the plan says {planned}")
    each = [after.ttft / before.ttft for (before, _), (after, _) in zip(whole, reuse, strict=True)]
    ratio = Ratio.of("TTFT", each if len(each) > 1 else each * 2)  # one conversation: a trial, without an interval
    return {
        "turn": turn + 1,
        "prompt_tokens": round(fmean(outcome.prompt_tokens for outcome, _ in whole)),
        "whole_bytes": round(fmean(sent)),
        "reuse_bytes": round(fmean(sent for _, sent in reuse)),
        "whole_ttft_ms": 1e3 * fmean(outcome.ttft for outcome, _ in whole),
        "reuse_ttft_ms": 1e3 * fmean(outcome.ttft for outcome, _ in reuse),
        "same_answers": sum(a.text == b.text for (a, _), (b, _) in zip(whole, reuse, strict=True)),
        "conversations": len(whole),
        "load_average": busy,
    } | ratio.model_dump()


def uniform(model: str, folder: Path) -> Bundle:
    """All rows of a model of recipes/units in k4v3."""
    units, file = ROOT / "recipes" / "units", folder.with_suffix(".yaml")
    parts = [str(units / name) for name in (f"model/{model}.yaml", "calibration/brown.yaml", "kv/k4v3.yaml")]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"include": parts, "name": folder.name}))
    return built(Recipe.load(file), folder)


if __name__ == "__main__":
    main()
