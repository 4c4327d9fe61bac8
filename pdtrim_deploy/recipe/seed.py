"""Seeds that torch's, numpy's and Python's generators all accept."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

MOST_SEED = 2**62  # torch accepts less than 2**64; blocks and batches add their number to the seed
Seed = Annotated[int, Field(ge=0, le=MOST_SEED)]


def seed_of_part(seed: int, number: int) -> int:
    """For the draws of one part, far from those of any other seed's parts; of any seed what torch accepts."""
    return (seed * 1_000_003 + number) % 2**64
