"""Which blocks of a model attend to a window of tokens alone, from its config.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, PositiveInt

from pdtrim_deploy.errors import UserError

WINDOWED, FULL = "sliding_attention", "full_attention"
_MOST = 10_000  # blocks: each gets an entry


class Windows(BaseModel):
    """Of a family whose windows SGLang attends to as transformers does.

    Attributes:
        every: one in so many blocks attends to all tokens, where config.json has neither `layer_types` nor
            `sliding_window_pattern`.
        pool: whether SGLang keeps windowed layers in a pool of their own, and then sends their windows alone. Where it
            has none it keeps and sends every row.

    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    every: PositiveInt
    pool: bool

    def of_blocks(self, config: Mapping[str, Any], where: str) -> tuple[int | None, ...]:
        """For each block how many tokens a query attends to, itself among them, None for all; empty where none has one.

        Raises:
            UserError: config.json gives no window, or other kinds of layers.

        """
        blocks: Any = config.get("num_hidden_layers")
        size = config.get("sliding_window")
        every = config.get("sliding_window_pattern") or self.every
        for key, value in (("num_hidden_layers", blocks), ("sliding_window_pattern", every)):
            if type(value) is not int or not 1 <= value <= _MOST:
                raise UserError(f"{where}: key {key} is {value!r}; it must be a whole number from 1 to {_MOST}")
        assert isinstance(blocks, int)
        implied = [FULL if block % every == every - 1 else WINDOWED for block in range(blocks)]
        kinds = config.get("layer_types") or implied
        if not isinstance(kinds, list) or not all(isinstance(kind, str) for kind in kinds):
            raise UserError(f"{where}: key layer_types is {kinds!r}; it must be a list of {FULL} and {WINDOWED}")
        if len(kinds) != blocks or set(kinds) - {WINDOWED, FULL}:
            types = ", ".join(sorted(map(str, set(kinds))))
            raise UserError(
                f"{where}: key layer_types has {len(kinds)} entries of {types}; it must have one of {FULL}, {WINDOWED} "
                f"for each of {blocks} blocks"
            )
        if WINDOWED not in kinds:
            return ()
        if type(size) is not int or size < 2:
            raise UserError(f"{where}: key sliding_window is {size!r}; it must be a whole number of at least 2")
        return tuple(size if kind == WINDOWED else None for kind in kinds)
