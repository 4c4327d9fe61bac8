"""Which experts each stage's blocks keep: a stage checkpoint of a mixture of experts may have fewer of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from pdtrim_deploy.plan.blocks import Frozen


class BlockExperts(Frozen):
    """Experts of one block that a stage keeps, by their number in the original block, ascending."""

    block: NonNegativeInt
    kept: tuple[NonNegativeInt, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _ascending(self) -> BlockExperts:
        if any(before >= after for before, after in pairwise(self.kept)):
            raise ValueError(f"block {self.block}: experts must ascend, not {list(self.kept)}")
        return self


class ExpertShape(Frozen):
    """What the plan must know of a model's experts.

    Attributes:
        count: routed experts in each block that has experts.
        top_k: experts that a token is sent to.
        first_block: blocks before this one have a dense MLP.
        groups: parts of equal size that the router first chooses among.
        top_groups: groups that a token's experts may come from.

    """

    count: PositiveInt
    top_k: PositiveInt
    first_block: NonNegativeInt = 0
    groups: PositiveInt = 1
    top_groups: PositiveInt = 1

    def smallest(self) -> int:
        """Fewest experts that a block may keep: `top_k` within the groups that a token reaches.

        A router with groups ranks them by their best two experts.
        """
        if self.groups == 1:
            return self.top_k
        return self.groups * max(2, -(-self.top_k // self.top_groups))

    def check_count(self, kept: int) -> None:
        """Raise ValueError, saying what is allowed, where a block cannot keep so many."""
        if not self.smallest() <= kept <= self.count:
            raise ValueError(f"{kept} experts are kept; allowed: {self.smallest()} to {self.count}")
        if kept % self.groups:
            raise ValueError(f"{kept} experts are kept; allowed: a multiple of the router's {self.groups} groups")

    def check(self, experts: BlockExperts) -> None:
        """Raise ValueError, naming the block, where the model has no such experts or its router cannot use them."""
        if experts.kept[-1] >= self.count:
            raise ValueError(f"block {experts.block} has experts 0 to {self.count - 1}, not {experts.kept[-1]}")
        try:
            self.check_count(len(experts.kept))
        except ValueError as error:
            raise ValueError(f"block {experts.block}: {error}") from None
        each = len(experts.kept) // self.groups
        in_group = Counter(number // (self.count // self.groups) for number in experts.kept)
        for group in range(self.groups):
            if in_group[group] != each:
                raise ValueError(
                    f"block {experts.block}: group {group} keeps {in_group[group]} experts; each of {self.groups} "
                    f"groups must keep {each}, as the router cuts them into equal parts"
                )


class KeptExperts(Frozen):
    """Experts that both stages keep, where one has fewer than the model.

    Attributes:
        shape: of the original model.
        prefill, decode: one entry for each block with experts that the stage runs, ascending; empty: it keeps all.

    """

    shape: ExpertShape
    prefill: tuple[BlockExperts, ...] = ()
    decode: tuple[BlockExperts, ...] = ()

    @model_validator(mode="after")
    def _fits(self) -> KeptExperts:
        if not self.prefill and not self.decode:
            raise ValueError("experts names neither stage; leave it out where both keep all experts")
        for stage in ("prefill", "decode"):
            entries = self.entries(stage)
            counts = {len(entry.kept) for entry in entries}
            for entry in entries:
                self.shape.check(entry)
            if len(counts) > 1:
                raise ValueError(
                    f"{stage} keeps {min(counts)} experts in some blocks and {max(counts)} in others; config.json has "
                    "one number for all"
                )
        return self

    def entries(self, stage: str) -> tuple[BlockExperts, ...]:
        """Of one stage."""
        return self.prefill if stage == "prefill" else self.decode

    def check_layers(self, stage: str, layers: Sequence[int]) -> None:
        """Raise ValueError unless a stage that runs `layers` has an entry for each of them that has experts."""
        named = [entry.block for entry in self.entries(stage)]
        expected = [block for block in layers if block >= self.shape.first_block]
        if named and named != expected:
            raise ValueError(f"{stage} names experts of blocks {named}, but runs blocks with experts {expected}")

    def by_block(self, stage: str) -> dict[int, tuple[int, ...]]:
        """Kept experts by block; empty where the stage keeps all."""
        return {entry.block: entry.kept for entry in self.entries(stage)}

    def count(self, stage: str) -> int:
        """Experts that each block of the stage has."""
        entries = self.entries(stage)
        return len(entries[0].kept) if entries else self.shape.count
