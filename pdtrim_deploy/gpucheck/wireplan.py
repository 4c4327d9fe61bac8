"""What the kernels' checks need of a plan, in plain dataclasses: pydantic, of which plans are made, may be missing.

`chunk_layout` lays out its rows as it does those of a `PDPlan` with the same rules (tests/gpucheck/test_wireplan.py).
"""

from __future__ import annotations

from dataclasses import dataclass

from pdtrim_deploy.plan.wire import LATENT_SIDES, SIDES, Code, Vectors, WireDtype


@dataclass(frozen=True)
class Shape:
    """Rows of every layer's pool; `rope_dim`: of a model with latents of `head_dim` numbers, in a native pool."""

    heads: int
    head_dim: int
    row_dtype: str
    rope_dim: int | None = None

    def vectors(self, kv_heads: int | None = None) -> tuple[Vectors, Vectors]:
        """Of a token's K and V in a layer, or of its rope key and latent, which are in halves."""
        if self.rope_dim is not None:
            return Vectors(2, self.rope_dim // 2), Vectors(2, self.head_dim // 2)
        return (Vectors(kv_heads or self.heads, self.head_dim),) * 2

    def codes(self, wire_dtype: WireDtype) -> tuple[Code, Code]:
        """Of K and V, or of a rope key and its latent."""
        return (SIDES if self.rope_dim is None else LATENT_SIDES)[wire_dtype]


@dataclass(frozen=True)
class Rule:
    """A layer sends all rows of a prompt, or the `first` and `last` ones."""

    wire_dtype: WireDtype
    first: int = 0
    last: int = 0

    @property
    def mode(self) -> str:
        """As a plan's rule has it: `full` or `sparse`."""
        return "sparse" if self.first + self.last else "full"

    def row_ranges(self, prompt_tokens: int) -> tuple[tuple[int, int], ...]:
        """Half-open ranges of prompt positions, ascending and disjoint."""
        if not self.first + self.last or self.first + self.last >= prompt_tokens:
            return ((0, prompt_tokens),)
        return tuple((lo, hi) for lo, hi in ((0, self.first), (prompt_tokens - self.last, prompt_tokens)) if lo < hi)


@dataclass(frozen=True)
class WirePlan:
    """Both stages have the same layers; quantised keys of all travel less an offset where `offsets` says so."""

    model: Shape
    kv: tuple[Rule, ...]
    offsets: bool = False

    @property
    def layer_map(self) -> tuple[int, ...]:
        """For each layer of decode, that of prefill."""
        return tuple(range(len(self.kv)))

    def has_key_offset(self, layer: int) -> bool:
        """Whether keys of a layer travel less an offset."""
        return self.offsets and self.model.codes(self.kv[layer].wire_dtype)[0] != "native"
