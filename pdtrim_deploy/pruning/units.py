"""What a search may take away, by number: block 5 is unit 5, its attention 1005, its MLP 2005.

So searches and their logs handle one kind of name, and those over whole blocks read as they always did.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, NamedTuple

from pdtrim_deploy.errors import UserError

Kind = Literal["block", "mlp", "attention"]
KINDS: tuple[Kind, ...] = ("block", "mlp", "attention")
"""In the order in which they are taken: what costs most comes first, as least else is gone then to choose among."""

STRIDE = 1000
_FIRST: dict[Kind, int] = {"block": 0, "attention": STRIDE, "mlp": 2 * STRIDE}
_KIND_OF: dict[int, Kind] = {first: kind for kind, first in _FIRST.items()}


class Counts(NamedTuple):
    """How many of each kind; whole blocks alone where nothing else is named."""

    blocks: int = 0
    mlps: int = 0
    attentions: int = 0

    def of(self, kind: Kind) -> int:
        """Of one kind."""
        return self[KINDS.index(kind)]

    @property
    def total(self) -> int:
        """Of all kinds."""
        return sum(self)

    @classmethod
    def of_units(cls, units: Iterable[int]) -> Counts:
        """Of some units."""
        kinds = [kind_of(unit) for unit in units]
        return cls(*(kinds.count(kind) for kind in KINDS))

    def __str__(self) -> str:
        """For readers: `3 blocks, 6 attentions`."""
        parts = [f"{count} {kind}{'s' * (count != 1)}" for kind, count in zip(KINDS, self, strict=True) if count]
        return ", ".join(parts).replace("mlp", "MLP") or "nothing"


def unit_of(kind: Kind, block: int) -> int:
    """The number of a block, or of a sublayer of it."""
    return _FIRST[kind] + block


def block_of(unit: int) -> int:
    """The block that a unit is, or is of."""
    return unit % STRIDE


def kind_of(unit: int) -> Kind:
    """What a unit is."""
    return _KIND_OF[unit - block_of(unit)]


def name_of(unit: int) -> str:
    """For readers: `block 5`, `attention 5`, `MLP 5`."""
    return f"{kind_of(unit)} {block_of(unit)}".replace("mlp", "MLP")


def check_blocks(blocks: int) -> None:
    """Raise UserError where a model has more blocks than units can name."""
    if blocks > STRIDE:
        raise UserError(f"the model has {blocks} blocks; searches over sublayers take at most {STRIDE}")
