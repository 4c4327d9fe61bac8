"""What a stage loses: blocks, sublayers, and adjacent pairs that one student block stands for. Pure data: no torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

from pdtrim_deploy.plan import Action, Distilled, Drop, Keep, Sublayer, WithoutAttention, WithoutMLP
from pdtrim_deploy.pruning.units import Counts, Kind, block_of, kind_of, name_of, unit_of

Op: TypeAlias = tuple[int, ...]
"""One layer of a pruned model: `(i,)` is block i, `(i, i + 1)` the student that stands at i for both, and `(i, unit)`
block i without its sublayer of that number (`units`)."""
_ACTIONS: dict[Kind, Action] = {"block": Drop(), "attention": WithoutAttention(), "mlp": WithoutMLP()}


def missing_in(op: Op) -> Sublayer | None:
    """The sublayer that a layer runs without."""
    if len(op) == 1:
        return None
    kind = kind_of(op[1])
    return None if kind == "block" else kind


@dataclass(frozen=True)
class Solution:
    """Blocks are named by their index in the dense model; both tuples ascend.

    Attributes:
        removed: units (`units`) that do not run, nor does anything in their place: blocks, then sublayers of others.
        distilled: first blocks of the pairs that run as one student; it reads the prompt KV of that first block.

    """

    removed: tuple[int, ...] = ()
    distilled: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        gone = [*map(block_of, self.removed), *self.distilled, *(first + 1 for first in self.distilled)]
        if len(set(gone)) != len(gone):
            raise ValueError(f"removed {self.removed} and pairs at {self.distilled} overlap")
        if sorted(self.removed) != list(self.removed) or sorted(self.distilled) != list(self.distilled):
            raise ValueError(f"removed {self.removed} and pairs at {self.distilled} must ascend")

    @classmethod
    def of(cls, removed: Iterable[int] = (), distilled: Iterable[int] = ()) -> Solution:
        """In any order."""
        return cls(tuple(sorted(removed)), tuple(sorted(distilled)))

    @classmethod
    def parse(cls, data: dict[str, Any]) -> Solution:
        """From a stage's entry in reports/pruning.json."""
        sublayers: list[Kind] = ["attention", "mlp"]
        lost = [unit_of(kind, block) for kind in sublayers for block in data.get(f"{kind}s", ())]
        return cls.of([*data["removed"], *lost], (first for first, _ in data.get("pairs", ())))

    @property
    def report(self) -> dict[str, Any]:
        """What `parse` reads, of the sublayers; nothing where whole blocks are lost alone."""
        lost = {kind: [block_of(unit) for unit in self.removed if kind_of(unit) == kind] for kind in _ACTIONS}
        return {f"{kind}s": blocks for kind, blocks in lost.items() if blocks and kind != "block"}

    @property
    def blocks(self) -> tuple[int, ...]:
        """Whole blocks that are removed."""
        return tuple(unit for unit in self.removed if kind_of(unit) == "block")

    @classmethod
    def read(cls, text: str) -> Solution:
        """The inverse of `str`: `"4, 5, 1007, 12+13"`, or `"nothing"`."""
        parts = [] if text == str(NOTHING) else text.split(", ")
        ops = [[int(block) for block in part.split("+")] for part in parts]
        return cls.of((op[0] for op in ops if len(op) == 1), (op[0] for op in ops if len(op) == 2))

    @property
    def saved(self) -> int:
        """Blocks and sublayers fewer than the dense model runs."""
        return len(self.removed) + len(self.distilled)

    @property
    def counts(self) -> Counts:
        """The same by kind; a distilled pair saves a block."""
        counts = Counts.of_units(self.removed)
        return counts._replace(blocks=counts.blocks + len(self.distilled))

    @property
    def pairs(self) -> tuple[tuple[int, int], ...]:
        """The distilled pairs."""
        return tuple((first, first + 1) for first in self.distilled)

    @property
    def touched(self) -> frozenset[int]:
        """Blocks that are removed, lost a sublayer, or are in a pair."""
        return frozenset(map(block_of, self.removed)).union(*self.pairs)

    def within(self, other: Solution) -> bool:
        """Whether `other` loses all that this one does."""
        return set(self.removed) <= set(other.removed) and set(self.distilled) <= set(other.distilled)

    def route(self, blocks: int) -> tuple[Op, ...]:
        """Layers of the pruned model of a dense one with `blocks` blocks, in order."""
        return tuple(self._route(blocks))

    def _route(self, blocks: int) -> Iterator[Op]:
        lost, touched = {block_of(unit): unit for unit in self.removed}, self.touched
        for block in range(blocks):
            if block in self.distilled:
                yield (block, block + 1)
            elif block not in touched:
                yield (block,)
            elif block in lost and kind_of(lost[block]) != "block":
                yield (block, lost[block])

    def actions(self, blocks: int) -> tuple[Action, ...]:
        """As the plan says it."""
        changed: dict[int, Action] = {block: Distilled(pair=p, kv_from=p[0]) for p in self.pairs for block in p}
        changed |= {block_of(unit): _ACTIONS[kind_of(unit)] for unit in self.removed}
        return tuple(changed.get(block, Keep()) for block in range(blocks))

    @property
    def label(self) -> str:
        """For readers: `4, attention 7, MLP 9, 12+13`; of whole blocks the number alone."""
        units = [str(unit) if kind_of(unit) == "block" else name_of(unit) for unit in self.removed]
        return ", ".join([*units, *(f"{a}+{b}" for a, b in self.pairs)]) or str(NOTHING)

    def __str__(self) -> str:
        """For logs, in units; `read` reads it."""
        parts = [str(block) for block in self.removed] + [f"{a}+{b}" for a, b in self.pairs]
        return ", ".join(parts) or "nothing"


NOTHING = Solution()
"""The dense model."""
