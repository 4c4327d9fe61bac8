"""How far rounding alone moves a plan's logprobs: what a right server may differ from the oracle by.

Two right programs sum in different orders, so the prompt KV of one is that of the other but for some roundings. A
quantised wire makes more of that: a value at the edge between two codes becomes the other one. So the oracle is run
again on its own prompt KV with noise of the size of such roundings, before it is packed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pdtrim_deploy.models.oracle import PDOracle, PrefillState

# Standard deviation, relative to the root mean square of a row's head. float32: 8 units in the last place, which moves
# the logprobs of a native wire by as much as serving SmolLM2 by SGLang does. 16 bits: half a unit in the last place.
NOISE = {"float32": 2.0**-20, "bfloat16": 2.0**-9, "float16": 2.0**-12}
DRAWS = 3


def score_shaken(oracle: PDOracle, state: PrefillState, tokens: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Log-probabilities of `tokens` `[T]` after the one prompt of `state`: `[T]`, and under noise `[DRAWS, T]`."""
    generator = torch.Generator().manual_seed(seed)
    noise = NOISE[oracle.plan.model.kv_dtype]
    keys, values = (tuple(_shaken(pool, noise, generator) for pool in side) for side in (state.keys, state.values))
    copies = PrefillState(1 + DRAWS, state.tokens, keys, values, state.logits.expand(1 + DRAWS, -1))
    scored = oracle.score(copies, tokens.expand(1 + DRAWS, -1))
    return scored[0], scored[1:]


def _shaken(pool: Tensor, noise: float, generator: torch.Generator) -> Tensor:
    """`[tokens, heads, dim]` -> itself, then `DRAWS` noisy copies, `[(1 + DRAWS) * tokens, heads, dim]`."""
    size = pool.float().pow(2).mean(-1, keepdim=True).sqrt().mul_(noise)
    drawn = torch.randn(DRAWS, *pool.shape, generator=generator).mul_(size).add_(pool)
    return torch.cat((pool, drawn.flatten(0, 1).to(pool.dtype)))
