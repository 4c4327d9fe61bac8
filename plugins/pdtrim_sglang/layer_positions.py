"""How far each KV layer of a request is. Prefill and decode count alike, so no rows are sent, or taken, twice."""

from __future__ import annotations

from itertools import groupby


class LayerPositions:
    """For each of decode's KV layers the prompt token up to which its rows have left prefill, or come to decode."""

    def __init__(self, layers: int, start: int) -> None:
        self._at = [start] * layers

    def __len__(self) -> int:
        """Layers."""
        return len(self._at)

    @property
    def first(self) -> int:
        """Of the layer that is the least far."""
        return min(self._at)

    def runs(self, layers: range) -> list[tuple[range, int]]:
        """`layers`, ascending, in runs of neighbours that are equally far, and how far those are."""
        runs = ((at, list(run)) for at, run in groupby(layers, self._at.__getitem__))
        return [(range(run[0], run[-1] + 1), at) for at, run in runs]

    def advance(self, layers: range, stop: int) -> None:
        """Rows of `layers` up to token `stop` are no longer missing."""
        for layer in layers:
            self._at[layer] = max(self._at[layer], stop)
