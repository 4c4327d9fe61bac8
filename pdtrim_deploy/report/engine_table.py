"""Engines of a bundle as a rich table for 80 columns, and the sentences that belong under it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from rich import box
from rich.table import Table

from pdtrim_deploy.bundle.engine import TargetResult

SHORT = {"PagedAttention": "A", "KVWrite": "W", "SparseKVSend": "S"}


def engine_table(engines: Iterable[TargetResult]) -> Table:
    """A row an engine: what it is, what is in it, how its graph was judged, how far it came."""
    table = Table("engine", "ops", "plugins", "numerics", "state", title="engines", box=box.SIMPLE_HEAD)
    table.columns[0].no_wrap = True
    for engine in engines:
        table.add_row(
            f"{engine.target} {engine.stage}\n{_dtype(engine)}, {engine.size / 1e6:,.1f} MB",
            f"{sum(engine.ops.values())} nodes\n{_ours(engine.ops)}" if engine.ops else "-",
            _ours(engine.plugins) or "-",
            _numerics(engine) or "-",
            engine.state,
        )
    table.caption = (
        f"{', '.join(f'{letter}: {op}' for op, letter in SHORT.items())}; errors are relative, of the graph.\n"
        "state: built, then checked, then run; each includes those before"
    )
    return table


def engine_notes(engines: Iterable[TargetResult]) -> Iterator[str]:
    """What was checked, where it has run, what a dry run would do, what a reader must know; once for each target."""
    by_target: dict[str, dict[str, None]] = {}
    for engine in engines:
        would = engine.details.get("would")
        notes = [f"checked: {what}" for what in engine.checked]
        notes += [f"run: {engine.run}"] if engine.run else []
        notes += [f"would {step}" for step in would] if isinstance(would, list) else []
        notes += [f"limit: {what}" for what in engine.limits]
        by_target.setdefault(engine.target, {}).update(dict.fromkeys(notes))
    return (f"{target}: {sentence}" for target, sentences in by_target.items() for sentence in sentences)


def _dtype(engine: TargetResult) -> str:
    """What the weights are quantised to, or the engine's dtype."""
    quantisations = [engine.details.get(key) for key in ("weights", "quantisation")]
    return next((str(name) for name in quantisations if name not in (None, "native", "none")), engine.dtype)


def _ours(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{counts[op]} {letter}" for op, letter in SHORT.items() if counts.get(op))


def _numerics(engine: TargetResult) -> str:
    """Worst relative errors."""
    errors = engine.numerics
    if errors is None:
        return ""
    kv = "" if errors.kv_error is None else f"\nKV {errors.kv_error:.1e}"
    return f"hidden {errors.hidden_error:.1e}{kv}\nallowed {errors.tolerance:.0e}"
