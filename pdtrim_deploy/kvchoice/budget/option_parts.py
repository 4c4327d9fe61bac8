"""The rows and the wire dtypes that KV options consist of: their effects are measured one by one, and add up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pdtrim_deploy.kvchoice.base import Problem
from pdtrim_deploy.plan import KVSend
from pdtrim_deploy.plan.wire import WireDtype


@dataclass(frozen=True)
class OptionParts:
    """Each of them once; a part's place counts rows first, dtypes behind them."""

    rows: tuple[KVSend, ...]
    dtypes: tuple[WireDtype, ...]

    @classmethod
    def of(cls, sends: Sequence[KVSend]) -> OptionParts:
        """Those of `sends`."""
        return cls(tuple(dict.fromkeys(map(_rows_of, sends))), tuple(dict.fromkeys(send.wire_dtype for send in sends)))

    def __len__(self) -> int:
        return len(self.rows) + len(self.dtypes)

    def places(self, send: KVSend) -> tuple[int, int]:
        """Of its rows and of its dtype."""
        return self.rows.index(_rows_of(send)), len(self.rows) + self.dtypes.index(send.wire_dtype)

    def others(self, problem: Problem, layer: int, send: KVSend) -> list[tuple[int, KVSend]]:
        """Other rows, then other dtypes, than `send` has in that layer; each with its place."""
        rows = [row.model_copy(update={"wire_dtype": send.wire_dtype}) for row in self.rows]
        sends = enumerate(rows + [send.model_copy(update={"wire_dtype": dtype}) for dtype in self.dtypes])
        return [(at, other) for at, other in sends if problem.rule(layer, other) != problem.rule(layer, send)]


def _rows_of(send: KVSend) -> KVSend:
    """The rows of an option, whatever its wire dtype."""
    return send.model_copy(update={"wire_dtype": "native"})
