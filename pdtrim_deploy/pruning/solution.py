"""What a stage loses: blocks removed, and adjacent pairs that one student block stands for. Pure data: no torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

from pdtrim_deploy.plan import Action, Distilled, Drop, Keep

Op: TypeAlias = tuple[int, ...]
"""One layer of a pruned model: `(i,)` is block i, `(i, i + 1)` the student that stands at i for both."""


@dataclass(frozen=True)
class Solution:
    """Blocks are named by their index in the dense model; both tuples ascend.

    Attributes:
        removed: blocks that do not run, nor does anything in their place.
        distilled: first blocks of the pairs that run as one student; it reads the prompt KV of that first block.

    """

    removed: tuple[int, ...] = ()
    distilled: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        gone = [*self.removed, *self.distilled, *(first + 1 for first in self.distilled)]
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
        return cls.of(data["removed"], (first for first, _ in data.get("pairs", ())))

    @classmethod
    def read(cls, text: str) -> Solution:
        """The inverse of `str`: `"4, 5, 12+13"`, or `"nothing"`."""
        parts = [] if text == str(NOTHING) else text.split(", ")
        ops = [[int(block) for block in part.split("+")] for part in parts]
        return cls.of((op[0] for op in ops if len(op) == 1), (op[0] for op in ops if len(op) == 2))

    @property
    def saved(self) -> int:
        """Blocks fewer than the dense model runs."""
        return len(self.removed) + len(self.distilled)

    @property
    def pairs(self) -> tuple[tuple[int, int], ...]:
        """The distilled pairs."""
        return tuple((first, first + 1) for first in self.distilled)

    @property
    def touched(self) -> frozenset[int]:
        """Blocks that are removed or in a pair."""
        return frozenset(self.removed).union(*self.pairs)

    def within(self, other: Solution) -> bool:
        """Whether `other` loses all that this one does."""
        return set(self.removed) <= set(other.removed) and set(self.distilled) <= set(other.distilled)

    def route(self, blocks: int) -> tuple[Op, ...]:
        """Layers of the pruned model of a dense one with `blocks` blocks, in order."""
        return tuple(self._route(blocks))

    def _route(self, blocks: int) -> Iterator[Op]:
        for block in range(blocks):
            if block in self.distilled:
                yield (block, block + 1)
            elif block not in self.touched:
                yield (block,)

    def actions(self, blocks: int) -> tuple[Action, ...]:
        """As the plan says it."""
        pair = {block: Distilled(pair=p, kv_from=p[0]) for p in self.pairs for block in p}
        return tuple(Drop() if b in self.removed else pair.get(b, Keep()) for b in range(blocks))

    def __str__(self) -> str:
        parts = [str(block) for block in self.removed] + [f"{a}+{b}" for a, b in self.pairs]
        return ", ".join(parts) or "nothing"


NOTHING = Solution()
"""The dense model."""
