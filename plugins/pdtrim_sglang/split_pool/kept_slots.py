"""Slots of the layers of one window: which of SGLang's tokens have one, and which are free."""

from __future__ import annotations

import torch
from torch import Tensor

from pdtrim_sglang.attention.windows import Window


class KeptSlots:
    """Slots 1 to `size`; slot 0 takes what SGLang writes for padding, and stands for tokens that are not kept.

    Slots are single tokens, whatever SGLang's page size is: a request holds exactly the rows that it attends to.

    Attributes:
        map: int64 `[full_slots]`, SGLang's slot -> ours.

    """

    def __init__(self, window: Window, size: int, full_slots: int, device: torch.device | str) -> None:
        self.window, self.size = window, size
        self.map = torch.zeros(full_slots, dtype=torch.int64, device=device)
        self.clear()

    def clear(self) -> None:
        """All free."""
        self.map.zero_()
        self._free = torch.arange(1, self.size + 1, dtype=torch.int64, device=self.map.device)

    @property
    def available(self) -> int:
        """Free slots."""
        return len(self._free)

    def rows(self, prompt_tokens: int) -> int:
        """Kept tokens of a prompt."""
        return min(prompt_tokens, self.window.n_first + self.window.n_last)

    def of_prompt(self, slots: Tensor, prompt_tokens: int) -> Tensor:
        """Those of SGLang's `slots`, of a request's tokens from its first on, whose tokens are kept."""
        position = torch.arange(len(slots), device=slots.device)
        return slots[(position < self.window.n_first) | (position >= prompt_tokens - self.window.n_last)]

    def take(self, slots: Tensor) -> None:
        """Give each of SGLang's `slots` (int64, distinct, without one) a slot of ours; there must be enough."""
        self.map[slots], self._free = self._free[: len(slots)], self._free[len(slots) :]

    def give_back(self, slots: Tensor) -> None:
        """SGLang has freed `slots` (int64, distinct); those without one of ours are passed over."""
        held = self.map[slots]
        self._free = torch.cat((self._free, held[held > 0]))
        self.map[slots] = 0
