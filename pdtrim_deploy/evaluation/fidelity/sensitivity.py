"""How far rounding alone moves a plan's logprobs: what a right server may differ from the oracle by.

Two right programs sum in different orders, so the prompt KV of one is that of the other but for some roundings. A
quantised wire makes more of that: a value at the edge between two codes becomes the other one. So the oracle is run
again on its own prompt KV with noise of the size of such roundings, before it is packed.

An fp8 pool is such an edge itself. What was rounded to a code lay anywhere in its cell, so noise is added to a value
drawn there, which becomes a neighbouring code about as often as the noise is large beside the cell.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pdtrim_deploy.kvcache.pool_rows import FP8, to_rows
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
    states = tuple((_shaken(conv, noise, generator), _shaken(last, noise, generator)) for conv, last in state.states)
    copies = PrefillState(1 + DRAWS, state.tokens, keys, values, state.logits.expand(1 + DRAWS, -1), states)
    scored = oracle.score(copies, tokens.expand(1 + DRAWS, -1))
    return scored[0], scored[1:]


def _shaken(pool: Tensor, noise: float, generator: torch.Generator) -> Tensor:
    """`[tokens, heads, dim]` -> itself, then `DRAWS` noisy copies, `[(1 + DRAWS) * tokens, heads, dim]`.

    Of a state, `[1, ..]`, likewise.
    """
    size = pool.float().pow(2).mean(-1, keepdim=True).sqrt().mul_(noise)
    drawn = torch.randn(DRAWS, *pool.shape, generator=generator).to(pool.device).mul_(size).add_(pool.float())
    if pool.dtype in FP8:
        drawn += _unrounded(pool, torch.rand(DRAWS, *pool.shape, generator=generator).to(pool.device) - 0.5)
    return torch.cat((pool, to_rows(drawn.flatten(0, 1), pool.dtype)))


def _unrounded(pool: Tensor, place: Tensor) -> Tensor:
    """float32: how far from its code in an fp8 pool a value lay, at `place`, from -0.5 to 0.5, of the code's cell."""
    limits, size = torch.finfo(pool.dtype), pool.float().abs()
    # Towards 0 a power of two's neighbour is half as far.
    size = torch.where(place * pool.float() < 0, size * (1 - limits.eps / 4), size)
    _, exponent = torch.frexp(size.clamp(min=limits.smallest_normal))
    return torch.ldexp(place * limits.eps, exponent - 1)
