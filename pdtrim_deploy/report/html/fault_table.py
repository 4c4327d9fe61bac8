"""What was done to a running pair, and what became of its requests (`make bench-faults`)."""

from __future__ import annotations

from typing import Any

from pdtrim_deploy.report.html.markup import Markup, join, table, tag

COLUMNS = ("sent", "answered", "aborted", "failed", "lost", "wrong")
# What every row of `make bench-faults` has; `grown` only that of a soak.
KEYS = {"fault", *COLUMNS, "slowest_s", "recovered_s", "transport", "reasons", "leaked"}
KEYS |= {"afterwards_sent", "afterwards_answered"}


def fault_table(results: dict[str, Any]) -> Markup:
    """One line a fault, and the sum."""
    rows = results["rows"]
    sums = {name: sum(row[name] for row in rows) for name in COLUMNS}
    leaks = sum(bool(row["leaked"]) for row in rows)
    after = sum(row["afterwards_answered"] for row in rows), sum(row["afterwards_sent"] for row in rows)
    over = ", ".join(sorted({row["transport"] for row in rows}))
    text = (
        f"Done to genuine workers and router on one machine, with a tiny random model (not this bundle) over {over}: "
        f"{sums['sent']:,} requests, {sums['lost']} without an answer or an error by their deadline, {sums['wrong']} "
        f"with a token that is not the oracle's; {leaks} of {len(rows)} faults left pages, staging memory or open "
        f"transfers behind; {after[0]} of {after[1]} requests of the healthy loads after each fault were answered. "
        "Failed: ended with an error, the reasons are below."
    )
    lines = [
        (
            row["fault"], *(row[name] for name in COLUMNS), f"{row['slowest_s']:.1f}", f"{row['recovered_s']:.1f}",
            "none" if not row["leaked"] else ", ".join(row["leaked"]),
        )
        for row in rows
    ]  # fmt: skip
    head = ("fault", *COLUMNS, "slowest end, s", "serves again after, s", "left behind")
    reasons = [
        tag("li", tag("strong", f"{row['fault']}: "), "; ".join(f"{n} x {why}" for why, n in row["reasons"].items()))
        for row in rows
        if row["reasons"]
    ]
    grown = [
        tag("p", tag("strong", f"{row['fault']}: "), "last third over first third: ",
            ", ".join(f"{what} x{ratio:.4f}" for what, ratio in row["grown"].items()))
        for row in rows
        if row.get("grown")
    ]  # fmt: skip
    details = (
        tag("details", tag("summary", "what the clients were told"), tag("ul", *reasons)) if reasons else Markup("")
    )
    return join([tag("p", text), table(head, [*lines, ("all", *sums.values(), "", "", "")]), *grown, details])
