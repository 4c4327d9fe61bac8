"""Pairs that are up at once and take the same load in turns."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

from pdtrim_deploy.bundle import Bundle
from pdtrim_deploy.loadtest import Scenario, Workers, driver
from pdtrim_deploy.loadtest.rounds import FIGURES, Ratio, Rounds, Side, interleave, repeats
from pdtrim_deploy.plan.link import Link
from pdtrim_deploy.serving import WorkerOptions, cluster_of, throttled


def in_turns(
    bundles: Mapping[str, Bundle], loads: Mapping[str, Scenario], rounds: int, link: Link | None = None
) -> dict[str, tuple[Rounds, float]]:
    """By load, all rounds on all these pairs, and the load average before them.

    Raises:
        SystemExit: a request failed.

    """
    with ExitStack() as stack:
        sides, results = dict[str, Side](), dict[str, tuple[Rounds, float]]()
        for name, bundle in bundles.items():
            options = WorkerOptions.beside_others(served_model_name=bundle.path.resolve().name)
            starting = cluster_of(bundle, options=options, say=print)
            cluster = stack.enter_context(throttled(starting, link) if link else starting)
            sides[name] = Side(cluster.url, Workers.of(cluster))
        for name, load in loads.items():
            time.sleep(60)  # of the start, a third is left in the load average over a minute
            busy = round(os.getloadavg()[0], 1)
            results[name] = interleave(sides, repeats(load, rounds), driver("builtin"), "builtin", print), busy
    for result, _ in results.values():
        if failed := {name: total.failure_details for name, total in result.total.items() if total.failed}:
            raise SystemExit(f"requests failed: {failed}")
    return results


def ratio(figure: str, name: str, dense: str, rounds: Rounds) -> Ratio:
    """A pair's figure over dense's."""
    read = FIGURES[figure]
    pairs = zip(rounds.by_round[dense], rounds.by_round[name], strict=True)
    each = [(read(pruned) or 0) / (read(whole) or 1) for whole, pruned in pairs]
    return Ratio.of(figure, each if len(each) > 1 else each * 2)  # one round: a trial, without an interval


def row_of(ratios: Ratio, busy: float, **about: Any) -> dict[str, Any]:
    """As results have it."""
    return {**about, "load_average": busy} | ratios.model_dump()
