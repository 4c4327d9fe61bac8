"""What computes a stage's forward pass inside an SGLang worker, when it is not SGLang's own model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from pdtrim_deploy.plan import Stage

Attention = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""(layer, q `[T, heads * head_dim]`, k, v `[T, kv_heads * head_dim]`) -> `[T, heads * head_dim]`: SGLang's backend.

Of a layer that is there for its K and V alone: hidden states in place of q, which come back as they are.
"""

CONFIG_KEY = "pdtrim_engine"
NO_SENDS: Mapping[str, Tensor] = {}


class EngineConfig(BaseModel):
    """What a worker is told under `pdtrim_engine` of its model's configuration (`--json-model-override-args`).

    Attributes:
        executor: name in `pdtrim_sglang.executors.EXECUTORS`.
        path: folder of the stage's engine, as a target of `pdtrim_builders` wrote it.
        stage: which stage it must be an engine of.

    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    executor: str
    path: str
    stage: Stage

    @classmethod
    def of(cls, config: Any) -> EngineConfig:
        """From a Hugging Face configuration; RuntimeError when it is not there or not valid."""
        try:
            return cls.model_validate(getattr(config, CONFIG_KEY, None))
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(str(part) for part in (CONFIG_KEY, *first["loc"]))
            raise RuntimeError(
                f"pdtrim: {place} of --json-model-override-args: {first['msg']}; start workers with pdtrim-deploy serve"
            ) from None


class StageExecutor(Protocol):
    """One stage's engine, loaded; everything but attention, LM head and sampling.

    `packs`: whether it packs the rows to send as plain rows, which a codec then quantises where the plan says so.
    """

    dtype: torch.dtype
    packs: bool

    def run(
        self,
        input_ids: Tensor,
        positions: Tensor,
        rows: Mapping[str, Tensor] = NO_SENDS,
        packed: Mapping[str, Tensor] = NO_SENDS,
    ) -> Tensor:
        """One forward pass; what `attention` raises comes out of here.

        Args:
            input_ids, positions: int64 `[T]`, all requests of the batch one after another.
            rows: int64 `[R]` by `send_rows_*` input; an input left out sends nothing.
            packed: where to write by `kv_send_*` output, `[2, R, kv_heads, head_dim]`.

        Returns:
            hidden states after the final norm, `[T, hidden]`.

        """
