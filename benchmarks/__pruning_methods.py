"""What benchmarks/pruning.py compares: which search chooses, and what is done for the blocks that are left."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Method:
    """One row of the table.

    Attributes:
        search: one that recipes may name, a baseline, or `sleb-cached`: SLEB with hidden states kept in front of every
            block, no racing.
        published: count the block-forwards of a search that keeps nothing: by the formula of `baselines`, which a
            test holds exact; its answer is the cached one's.
        seeded: whether seeds change it.
        finalists: judged again with that compensation, which decides; baselines: methods whose choices are judged too.
        trained: whether gradients are taken; the others are compared among themselves.
        sizes: numbers of blocks that it is asked for, of those that decode loses, by default.
        layer: LLM-Streamline's: the block in front of each removed window is taught to stand for both.

    """

    search: str
    seeded: bool = False
    distil: bool = False
    compensation: str = "none"
    finalists: int = 0
    baselines: tuple[str, ...] = ()
    healed: bool = False
    layer: bool = False
    published: bool = False
    sizes: tuple[int, ...] = (6, 2, 4, 8)

    @property
    def trained(self) -> bool:
        """Whether it takes gradient steps."""
        return self.healed or self.layer

    @property
    def choosing(self) -> tuple[object, ...]:
        """What a choice of blocks depends on: methods that have it in common choose alike."""
        judged_by = self.compensation if self.finalists else "none"
        return self.search, self.distil, self.finalists, judged_by, *([self.baselines] if self.baselines else [])

    @property
    def treatment(self) -> tuple[str, bool, bool]:
        """What is done for the blocks that are left: with the plan, all that a row's quality depends on."""
        return self.compensation, self.healed, self.layer


_PARTS = (6, 4)  # where a gain comes from is asked at these
_OURS = Method("anneal", seeded=True, distil=True, compensation="least-squares", finalists=4)
METHODS = {
    "random": Method("random", seeded=True),
    "ShortGPT": Method("cosine"),
    "Shortened LLaMA": Method("perplexity"),
    "LLM-Streamline, no layer": Method("streamline"),
    "ShortGPT, refitted": Method("cosine", compensation="least-squares"),
    "LLM-Streamline, no layer, refitted": Method("streamline", compensation="least-squares"),
    "ShortGPT, healed": Method("cosine", compensation="least-squares", healed=True),
    "LLM-Streamline, no layer, healed": Method("streamline", compensation="least-squares", healed=True),
    "SLEB, cached": Method("sleb-cached"),
    "SLEB": Method("sleb-cached", published=True),
    "ours": _OURS,
    # each without one thing
    "ours, no D": replace(_OURS, distil=False, sizes=_PARTS),
    "ours, no annealing": Method("greedy", compensation="least-squares", finalists=2),
    "ours, no annealing, baselines": Method(
        "greedy", compensation="least-squares", finalists=2, baselines=("streamline", "cosine")
    ),
    "ours, no compensation": replace(_OURS, compensation="none", finalists=0, sizes=_PARTS),
    "ours, greedy": Method("greedy"),  # without any of the three
    "ours, greedy, rescaled": Method("greedy", compensation="norm", sizes=_PARTS),  # Prune&Comp instead of the refit
    "LLM-Streamline": Method("streamline", layer=True),
    "ours, healed": replace(_OURS, healed=True, sizes=_PARTS),
    "ours, no annealing, healed": Method("greedy", compensation="least-squares", finalists=2, healed=True),
}


def prefill_blocks(removed: int) -> int:
    """A third of what decode loses, rounded."""
    return round(removed / 3)
