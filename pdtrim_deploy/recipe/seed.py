"""Seeds: what every generator takes, torch's, numpy's and Python's."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

MOST_SEED = 2**62  # torch takes less than 2**64; blocks and batches add their number to it
Seed = Annotated[int, Field(ge=0, le=MOST_SEED)]
