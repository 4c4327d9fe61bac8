"""Prices side by side: two columns for each unpruned model, whose pool is native or fp8, then one for each plan."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from rich.table import Table

from pdtrim_deploy.plan import ModelShape
from pdtrim_deploy.sizing import Link, Price, Side, Subject, Traffic


def sizing_table(priced: list[tuple[Subject, Price]], traffic: Traffic) -> Table:
    """One row per figure; `-` if it does not apply, `n/a` if an input is missing."""
    sides = list(_columns(priced))
    table = Table("one request", *(name for name, _, _ in sides), title=_title(traffic))
    for column in table.columns[1:]:
        column.justify = "right"
    rows: dict[str, Callable[[Side], str]] = {
        "bytes sent": lambda s: _size(s.request_bytes),
        "transfer": lambda s: _time(s.transfer_s),
        "prefill": lambda s: _time(s.prefill_s),
        "share of TTFT": lambda s: _share(s.transfer_share_of_ttft),
        "decode pool": lambda s: _size(s.decode_pool_bytes),
        "... split": lambda s: _size(s.two_pool_bytes),
        "most requests/s": lambda s: f"{s.max_rate:.4g}",
    }
    if traffic.rate is not None:
        rows[f"{traffic.rate:g} requests/s"] = lambda s: "fit" if s.fits else "DO NOT FIT"
        rows["... link used"] = lambda s: _share(s.utilisation)
        rows["... link needed"] = lambda s: str(Link(s.link_bits_per_s_needed or 0))
    reductions: dict[str, Callable[[Price], float]] = {
        "less than dense": lambda cost: cost.reduction,
        "less than dense fp8": lambda cost: cost.reduction_fp8,
    }
    for label, cell in rows.items():
        table.add_row(label, *(cell(side) for _, side, _ in sides))
        for name, less in reductions.items() if label == "bytes sent" else ():
            table.add_row(name, *("-" if cost is None else f"{less(cost):.2f}x" for _, _, cost in sides))
    return table


def _title(traffic: Traffic) -> str:
    return f"{traffic.isl} tokens in, {traffic.osl} out, {traffic.link} link"


class _Column(NamedTuple):
    """`cost` is None of an unpruned model."""

    name: str
    side: Side
    cost: Price | None


def _columns(priced: list[tuple[Subject, Price]]) -> Iterator[_Column]:
    """Equal shapes share their dense columns, in the order of first mention."""
    models: dict[ModelShape, list[tuple[Subject, Price]]] = {}
    for subject, cost in priced:
        bare = subject.plan.model.with_pool("native").model_copy(update={"fingerprint": subject.model})
        models.setdefault(bare, []).append((subject, cost))
    for shape, group in models.items():
        unpruned, dense = group[0]
        yield _Column(f"{unpruned.model} dense {shape.kv_dtype}", dense.dense, None)
        yield _Column(f"{unpruned.model} dense fp8", dense.dense_fp8, None)
        for subject, cost in group:
            if subject.kind != "config":
                yield _Column(subject.name, cost.planned, cost)


def _size(count: int) -> str:
    for power, unit in ((4, "TB"), (3, "GB"), (2, "MB"), (1, "kB")):
        if count >= 1000**power:
            return f"{count / 1000**power:.2f} {unit}"
    return f"{count} B"


def _time(seconds: float | None) -> str:
    return "n/a" if seconds is None else f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1000:.4g} ms"


def _share(share: float | None) -> str:
    return "n/a" if share is None else f"{share:.1%}"
