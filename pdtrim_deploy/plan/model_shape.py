"""What a plan must know of a model, and what a row of its KV is in a pool and on the wire."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, PositiveInt, SerializerFunctionWrapHandler, model_serializer, model_validator

from pdtrim_deploy.plan.blocks import Frozen
from pdtrim_deploy.plan.kv import KVSend
from pdtrim_deploy.plan.linear_states import LinearStates, StateDtype
from pdtrim_deploy.plan.wire import (
    FP8_ROWS,
    HEAD_DIM_MULTIPLE,
    LATENT_SIDES,
    SIDES,
    SMALLER_THAN_FP8,
    Code,
    PoolDtype,
    Vectors,
    WireDtype,
    side_bytes,
)

NativeDtype = Literal["float32", "bfloat16", "float16"]
Window = Annotated[int, Field(ge=2)]


class ModelShape(Frozen):
    """What the plan must know of the model, and of the KV pools that it is served with.

    Attributes:
        kv_dtype: what the model computes in; a native pool's dtype.
        pool_dtype: of both stages' KV pools; absent from JSON, and so from digests, when native.
        windows: by block, how many tokens a query attends to, itself among them; None: to all before it. Absent from
            JSON, and empty, where no block has a window.
        rope_dim: of a model with latent attention (MLA), numbers of a token's rope key. `head_dim` is then the size of
            its latent, of which there is one a token for all heads: `num_kv_heads` is 1. Absent from JSON, and None, of
            other models.

    """

    architecture: str
    fingerprint: str
    num_blocks: PositiveInt
    num_kv_heads: PositiveInt
    head_dim: PositiveInt
    kv_dtype: NativeDtype
    pool_dtype: PoolDtype = "native"
    windows: tuple[Window | None, ...] = ()
    rope_dim: PositiveInt | None = None
    states: LinearStates | None = None

    @model_serializer(mode="wrap")
    def _without_native(self, serialise: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Plans of native pools, without windows, latents or states, read as they did before there were others."""
        absent = {"pool_dtype": self.pool_dtype == "native", "windows": not self.windows}
        absent |= {"rope_dim": self.rope_dim is None, "states": self.states is None}
        return {key: value for key, value in serialise(self).items() if not absent.get(key)}

    @model_validator(mode="after")
    def _windows_of_blocks(self) -> ModelShape:
        if self.windows and len(self.windows) != self.num_blocks:
            raise ValueError(f"windows has {len(self.windows)} entries, the model {self.num_blocks} blocks")
        if self.windows and not any(self.windows):
            raise ValueError("windows has no window; leave it out")
        return self

    @model_validator(mode="after")
    def _one_latent(self) -> ModelShape:
        if self.rope_dim is None:
            return self
        if self.num_kv_heads != 1 or self.windows:
            raise ValueError("a model with latents has one KV head, and no windows")
        if self.rope_dim % 2 or self.head_dim % 2:
            raise ValueError(f"a latent of {self.head_dim} and a rope key of {self.rope_dim} do not travel in halves")
        return self

    @model_validator(mode="after")
    def _states_of_blocks(self) -> ModelShape:
        if self.states is None:
            return self
        if self.windows or self.rope_dim is not None:
            raise ValueError("a model with linear attention has neither windows nor latents")
        if self.states.blocks[-1] >= self.num_blocks:
            raise ValueError(f"block {self.states.blocks[-1]} has a state, the model {self.num_blocks} blocks")
        if len(self.states.blocks) == self.num_blocks:
            raise ValueError("every block has a state, so that there is no KV to plan")
        return self

    @property
    def kv_blocks(self) -> tuple[int, ...]:
        """Blocks of the unpruned model that have K and V, ascending: all but those that keep a state."""
        stateful = () if self.states is None else self.states.blocks
        return tuple(block for block in range(self.num_blocks) if block not in stateful)

    @property
    def state_bytes(self) -> int:
        """Bytes of a request's states, whatever the length of its prompt; 0 where no block keeps one."""
        return 0 if self.states is None else self.states.bytes

    @property
    def conv_dtype(self) -> StateDtype | None:
        """Of the convolution's states; None of a model that has none."""
        return None if self.states is None else self.states.conv_dtype

    @property
    def offsets_keys(self) -> bool:
        """Whether keys may travel less a constant: no latents, nor keys that RoPE rotates a part of (Qwen3-Next)."""
        return self.rope_dim is None and self.states is None

    def vectors(self, kv_heads: int | None = None) -> tuple[Vectors, Vectors]:
        """What a token's K and V consist of in a layer, or its rope key and latent, of a rank with `kv_heads` heads."""
        if self.rope_dim is not None:
            return Vectors(2, self.rope_dim // 2), Vectors(2, self.head_dim // 2)
        return (Vectors(kv_heads or self.num_kv_heads, self.head_dim),) * 2

    def codes(self, wire_dtype: WireDtype) -> tuple[Code, Code]:
        """The codes of both; a rope key of an fp8 pool travels as it is, which is smaller than int8."""
        if self.rope_dim is None:
            return SIDES[wire_dtype]
        rope, latent = LATENT_SIDES[wire_dtype]
        return rope if self.pool_dtype == "native" else "native", latent

    def misfit(self, wire_dtype: WireDtype) -> str:
        """Why rows cannot travel in a wire dtype, in one clause; empty when they can."""
        if self.rope_dim is None:
            multiple = HEAD_DIM_MULTIPLE[wire_dtype]
            fits = self.head_dim % multiple == 0
            return "" if fits else f"needs a head size that is a multiple of {multiple}, the model's is {self.head_dim}"
        if wire_dtype not in LATENT_SIDES:
            return f"gives keys and values other codes, and a latent is both: use {', '.join(LATENT_SIDES)}"
        least = 2 * HEAD_DIM_MULTIPLE[wire_dtype]
        if self.head_dim % least or (wire_dtype != "native" and self.rope_dim % 4):
            return (
                f"needs a latent whose size is a multiple of {least} and a rope key of a multiple of 4, the model's "
                f"are {self.head_dim} and {self.rope_dim}"
            )
        return ""

    def suits(self, send: KVSend) -> bool:
        """Whether rows can travel in the wire dtype of `send`, and are smaller so than in the pool."""
        smaller = self.pool_dtype == "native" or send.wire_dtype in SMALLER_THAN_FP8
        return smaller and not self.misfit(send.wire_dtype)

    def packed_bytes(self, wire_dtype: WireDtype, rows: int, first: bool) -> int:
        """Bytes of K and V of `rows` rows of one layer as packed; `first`: prompt position 0 is among them."""
        both = zip(self.codes(wire_dtype), self.vectors(), strict=True)
        return sum(side_bytes(code, self.row_dtype, vectors, rows, first) for code, vectors in both)

    def window(self, block: int) -> int | None:
        """How many tokens a query of a block attends to; None: to all before it."""
        return self.windows[block] if self.windows else None

    def with_windows(self, windows: tuple[int | None, ...]) -> ModelShape:
        """The same model, had its blocks these windows; none where there is no entry."""
        return self.model_copy(update={"windows": windows})

    def rule(self, block: int, send: KVSend) -> KVSend:
        """What a rule means for a block: its wire dtype, and of a block with a window all rows that decode reads.

        Decode's first token stands behind the prompt and attends to itself, so it reads a row less than the window.
        """
        if (window := self.window(block)) is not None:
            return KVSend(mode="window", n_last=window - 1, wire_dtype=send.wire_dtype)
        return KVSend(wire_dtype=send.wire_dtype) if send.mode == "window" else send

    @property
    def row_dtype(self) -> str:
        """Torch's name of the dtype of a pool's rows, which `native` on the wire sends as they are."""
        return FP8_ROWS.get(self.pool_dtype, self.kv_dtype)

    def with_pool(self, pool_dtype: PoolDtype) -> ModelShape:
        """The same model served with other pools."""
        return self.model_copy(update={"pool_dtype": pool_dtype})
