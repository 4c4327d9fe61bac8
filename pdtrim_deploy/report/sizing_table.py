"""Prices side by side: one column for each unpruned model, then one for each of its plans."""

from __future__ import annotations

from collections.abc import Callable, Iterator

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
    first = True
    for label, cell in rows.items():
        table.add_row(label, *(cell(side) for _, side, _ in sides))
        if first:
            table.add_row("less than dense", *("-" if less is None else f"{less:.2f}x" for _, _, less in sides))
            first = False
    return table


def _title(traffic: Traffic) -> str:
    return f"{traffic.isl} tokens in, {traffic.osl} out, {traffic.link} link"


def _columns(priced: list[tuple[Subject, Price]]) -> Iterator[tuple[str, Side, float | None]]:
    """(title, figures, reduction); equal shapes share their dense column, in the order of first mention."""
    models: dict[ModelShape, list[tuple[Subject, Price]]] = {}
    for subject, cost in priced:
        bare = subject.plan.model.model_copy(update={"fingerprint": subject.model})
        models.setdefault(bare, []).append((subject, cost))
    for shape, group in models.items():
        yield f"{group[0][0].model} dense {shape.kv_dtype}", group[0][1].dense, None
        for subject, cost in group:
            if subject.kind != "config":
                yield subject.name, cost.planned, cost.reduction


def _size(count: int) -> str:
    for power, unit in ((4, "TB"), (3, "GB"), (2, "MB"), (1, "kB")):
        if count >= 1000**power:
            return f"{count / 1000**power:.2f} {unit}"
    return f"{count} B"


def _time(seconds: float | None) -> str:
    return "n/a" if seconds is None else f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1000:.4g} ms"


def _share(share: float | None) -> str:
    return "n/a" if share is None else f"{share:.1%}"
