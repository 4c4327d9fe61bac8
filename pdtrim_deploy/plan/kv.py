"""How one layer's prompt KV travels: rows, dtype, and which layers' keys have an offset subtracted."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, Literal

from pydantic import Field, NonNegativeInt, SerializerFunctionWrapHandler, model_serializer, model_validator

from pdtrim_deploy.plan.blocks import Frozen
from pdtrim_deploy.plan.wire import HEAD_DIM_MULTIPLE, SMALLER_THAN_FP8, PoolDtype, WireDtype

# In each stage checkpoint. A safetensors file with another suffix, since servers load *.safetensors as weights.
KEY_OFFSETS = "pdtrim_key_offsets.tensors"
SHARE_UNIT = 1024  # shares of a prompt are whole numbers of 1024ths, so that all machines count the same rows


class KVSend(Frozen):
    """How one block's prompt KV travels: all rows, or the first and the last ones of a prompt.

    Of a prompt of N tokens a cut layer sends `max(n_first + n_last, ceil(N * share / 1024))` rows, at most N: the first
    `n_first`, and the last ones for the rest. `edges` is the only place that computes this.

    Attributes:
        share: of the prompt's rows, in 1024ths; absent from JSON, and so from digests, when 0: rows are then a number.
            With a share, `n_first + n_last` is the least number of rows.
        mode: `window`: the last `n_last` rows are all that the block's attention reads in decode: none is cut.

    """

    mode: Literal["full", "sparse", "window"] = "full"
    n_first: int = Field(default=0, ge=0)
    n_last: int = Field(default=0, ge=0)
    share: int = Field(default=0, ge=0, lt=SHARE_UNIT)
    wire_dtype: WireDtype = "native"

    @model_serializer(mode="wrap")
    def _without_share(self, serialise: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Rules without shares read as they did before there were any."""
        return {key: value for key, value in serialise(self).items() if key != "share" or value}

    @model_validator(mode="after")
    def _sizes(self) -> KVSend:
        if self.mode == "sparse" and self.n_first + self.n_last == 0:
            raise ValueError("sparse KV needs n_first + n_last of at least 1")
        if self.mode == "full" and (self.n_first or self.n_last):
            raise ValueError("full KV takes no n_first or n_last")
        if self.mode == "window" and (self.n_first or not self.n_last):
            raise ValueError("a window's KV takes no n_first, and n_last of at least 1")
        if self.mode != "sparse" and self.share:
            raise ValueError(f"{'full KV' if self.mode == 'full' else 'the KV of a window'} takes no share")
        return self

    @property
    def row_names(self) -> str:
        """Which rows travel, for readers."""
        if self.share:
            return f"first {self.n_first} + last {self.n_last}, or {self.share}/{SHARE_UNIT} of the prompt if more"
        if self.mode == "sparse":
            return f"first {self.n_first} + last {self.n_last}"
        return "full" if self.mode == "full" else f"last {self.n_last}, its window"

    def suits(self, head_dim: int, pool_dtype: PoolDtype = "native") -> bool:
        """Whether heads of this size can travel in the wire dtype, and make rows of such a pool smaller."""
        smaller = pool_dtype == "native" or self.wire_dtype in SMALLER_THAN_FP8
        return smaller and head_dim % HEAD_DIM_MULTIPLE[self.wire_dtype] == 0

    def edges(self, prompt_tokens: int) -> tuple[int, int]:
        """How many first and how many last prompt rows travel; together no more than the prompt has."""
        if self.mode == "full":
            return 0, prompt_tokens
        rows = min(prompt_tokens, max(self.n_first + self.n_last, -(-prompt_tokens * self.share // SHARE_UNIT)))
        first = min(self.n_first, rows)
        return first, rows - first

    def row_ranges(self, prompt_tokens: int) -> tuple[tuple[int, int], ...]:
        """Half-open ranges of absolute prompt positions that travel, ascending and disjoint."""
        first, last = self.edges(prompt_tokens)
        if first + last == prompt_tokens:
            return ((0, prompt_tokens),)
        ranges = ((0, first), (prompt_tokens - last, prompt_tokens))
        return tuple(r for r in ranges if r[0] < r[1])

    def rows(self, prompt_tokens: int) -> int:
        """Number of prompt rows that travel."""
        return sum(self.edges(prompt_tokens))


class KeyOffsetsFile(Frozen):
    """KV layers of decode whose quantised keys travel less an offset, and the file of offsets that both ends have.

    Attributes:
        sha256: of the file's bytes, 64 hex digits (`kvcache/key_offsets.py`).
        layers: of decode, ascending.
        scaled: whether the file has key scales too; absent from JSON, and so from digests, when not. Versions that know
            no key scales refuse such a plan.

    """

    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    layers: tuple[NonNegativeInt, ...] = Field(min_length=1)
    scaled: bool = False

    @model_serializer(mode="wrap")
    def _without_scaled(self, serialise: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Files without key scales read as they did before there were any."""
        return {key: value for key, value in serialise(self).items() if key != "scaled" or value}

    @property
    def form(self) -> str:
        """How keys travel, for readers."""
        return "keys less their mean, scaled" if self.scaled else "keys less their mean"

    @model_validator(mode="after")
    def _ascending(self) -> KeyOffsetsFile:
        if any(before >= after for before, after in pairwise(self.layers)):
            raise ValueError(f"layers with key offsets must ascend, not {list(self.layers)}")
        return self
