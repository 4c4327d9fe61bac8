"""Workers side by side: a column for each model unpruned, then one for each of its plans."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from rich.table import Table

from pdtrim_deploy.simulation import Figures, SizedSide
from pdtrim_deploy.sizing import Link
from pdtrim_deploy.sizing.workers import Goal, Sizing

COMPUTED: dict[str, Callable[[Sizing], str]] = {
    "prefill workers": lambda s: _count(s.prefill_workers),
    "decode workers": lambda s: _count(s.decode_workers),
    "largest decode batch": lambda s: _count(s.decode_batch),
    "TTFT p95, at most": lambda s: _ms(s.ttft_p95_ms),
    "link needed": lambda s: "-" if s.link_bits_per_s_needed is None else str(Link(s.link_bits_per_s_needed)),
}
SIMULATED: dict[str, Callable[[Figures], str]] = {
    "TTFT p50 / p95": lambda f: f"{_ms(f.ttft_ms.p50)} / {_ms(f.ttft_ms.p95)}",
    "ITL p50 / p95": lambda f: f"{_ms(f.itl_ms.p50)} / {_ms(f.itl_ms.p95)}",
    "within the SLO": lambda f: f"{f.good_share:.1%}",
    "prefill / decode / link busy": lambda f: f"{f.prefill_busy:.0%} / {f.decode_busy:.0%} / {f.link_busy:.0%}",
}


def workers_table(sides: Mapping[str, SizedSide], goal: Goal) -> Table:
    """For a terminal."""
    table = Table("workers", *sides, title=goal_text(goal.rate, goal.ttft_s, goal.itl_s))
    for column in table.columns[1:]:
        column.justify = "right"
    for row in workers_rows(sides):
        table.add_row(*row)
    return table


def workers_rows(sides: Mapping[str, SizedSide]) -> list[tuple[str, ...]]:
    """Computed rows, then simulated ones where there are any; a label, then a cell a side."""
    rows = [(label, *(cell(side.sizing) for side in sides.values())) for label, cell in COMPUTED.items()]
    if any(side.simulated for side in sides.values()):
        for label, format_value in SIMULATED.items():
            cells = ("-" if side.simulated is None else format_value(side.simulated) for side in sides.values())
            rows.append((f"simulated: {label}", *cells))
    return rows


def goal_text(rate: float, ttft_s: float, itl_s: float) -> str:
    """What the workers are for."""
    return f"{rate:g} requests/s, 95% within TTFT {_ms(ttft_s * 1e3)} and ITL {_ms(itl_s * 1e3)}"


def _count(value: int | None) -> str:
    return "none would do" if value is None else f"{value:,}"


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value / 1e3:.3g} s" if value >= 1000 else f"{value:.4g} ms"
