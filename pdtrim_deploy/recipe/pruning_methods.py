"""The pruning methods that a recipe may name: what each takes and what it will cost. Registered here and nowhere else.

No torch: a recipe is read, and a search priced, without it. The search itself is `search(settings)` of the module
`pdtrim_deploy.pruning.search.NAME`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

SEARCH_VERSION = 7  # of how searches go: logs, and steps of a build, that another version made are made again

# Share of the work that early stopping leaves; not a promise. RACED was measured on SmolLM2-135M with 16 x 256 tokens
# (prefill 0.16 for 2 rounds, decode 0.26 for 4), ANNEALED is assumed.
RACED, ANNEALED = 0.22, 0.3
_EVALUATED = (
    "objective", "racing", "finalists", "memory_mb", "disk_mb", "prefill_attentions", "decode_attentions",
    "prefill_mlps", "decode_mlps", "baselines",
)  # fmt: skip


@dataclass(frozen=True)
class Work:
    """Of one stage's search, for one sequence.

    Attributes:
        most, likely: block-forwards.
        losses: taken likely, exactly; screened: by a sample of the vocabulary, where the objective has one.

    """

    most: float
    likely: float
    losses: float
    screened: float = 0.0

    @property
    def unraced(self) -> Work:
        """Where no candidate leaves early."""
        return Work(self.most, self.most, (self.losses + self.screened) * self.most / self.likely)

    def __add__(self, other: Work) -> Work:
        """Both."""
        return Work(
            self.most + other.most,
            self.likely + other.likely,
            self.losses + other.losses,
            self.screened + other.screened,
        )


WorkEstimate = Callable[[int, int, int, int], Work]
"""From the model's blocks, the blocks gone before and after the search, and the steps of annealing."""


PassEstimate = Callable[[int, int, int], float]
"""From the blocks that go, the steps of annealing and the parts of the text: how often all blocks run at most, one
after another, for all candidates that are evaluated together."""


@dataclass(frozen=True)
class PruningMethod:
    """One method.

    Attributes:
        work: what its search costs.
        passes: how often it goes through the blocks, each of which comes from disk where memory is short.
        options: keys of the recipe's section that it takes, besides those that every method takes.
        evaluated: it asks an `Evaluator` for losses, which keeps hidden states and may be Ray's workers.
        window: it compares hidden states that are as many blocks apart as blocks go, and holds all between them.

    """

    work: WorkEstimate
    passes: PassEstimate
    options: tuple[str, ...] = ()
    evaluated: bool = False
    window: bool = False


def greedy_work(blocks: int, first: int, last: int, _: int) -> Work:
    """Behind each candidate of each round, and one whole run of the start; the last two of a round exactly."""
    rounds = [blocks - gone for gone in range(first, last)]
    most = sum(left * (left - 1) / 2 for left in rounds)
    return Work(most + blocks, RACED * most + blocks, 2 * len(rounds) + 1, RACED * sum(rounds))


def sublayer_work(layers: int, sublayers: int) -> Work:
    """Of greedy rounds for so many sublayers, each behind all candidates of `layers` layers, which all run on."""
    runs, candidates = sublayers * layers * (layers + 1) / 2, sublayers * layers
    return Work(runs + sublayers * layers, RACED * runs + sublayers * layers, 2 * sublayers, RACED * candidates)


def anneal_work(blocks: int, first: int, last: int, steps: int) -> Work:
    """A swap changes two places: of `left` layers two thirds lie behind the first of them, on average."""
    start, left = greedy_work(blocks, first, last, steps), blocks - last
    return Work(
        start.most + steps * left,
        start.likely + ANNEALED * steps * left * 2 / 3,
        start.losses + ANNEALED * steps,
        start.screened,
    )


def one_pass_work(blocks: int, _: int, __: int, ___: int) -> Work:
    """The dense model once, no loss."""
    return Work(blocks, blocks, 0)


def greedy_passes(removed: int, _: int, batches: int) -> float:
    """A round looks at the first part twice (the best few of the last round first), then at the winner's rest."""
    return removed * (2 * batches + 1)


def anneal_passes(removed: int, steps: int, batches: int) -> float:
    """Greedy's, and each proposal by itself."""
    return greedy_passes(removed, steps, batches) + steps * batches


def one_pass(_: int, __: int, ___: int) -> float:
    """All text goes through each block together."""
    return 1


METHODS: dict[str, PruningMethod] = {
    "anneal": PruningMethod(anneal_work, anneal_passes, ("steps", "minutes", "seed", *_EVALUATED), evaluated=True),
    "cosine": PruningMethod(one_pass_work, one_pass),
    "greedy": PruningMethod(greedy_work, greedy_passes, _EVALUATED, evaluated=True),
    "streamline": PruningMethod(one_pass_work, one_pass, window=True),
}
EVALUATED = tuple(name for name, method in METHODS.items() if method.evaluated)
ONE_SHOT = tuple(name for name, method in METHODS.items() if not method.evaluated)
"""Rank blocks by the dense model's hidden states, measure no loss, and take whole blocks alone."""
