"""Slots of the layers of one rule, and the table of them by request, on the device of the KV pool.

Nothing here reads a value back from the device: how many pages a request holds is known on the host (`groups.py`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from pdtrim_sglang.kept_pool.rule import KeptRule


def table_width(slots: int, longest: int, page_size: int) -> int:
    """Slots, in whole pages, that a request can hold of `slots` when texts have up to `longest` tokens."""
    return -(-min(longest, slots) // page_size) * page_size


class KeptGroup:
    """Pages 1 to `pages` of `page_size` slots; page 0 takes what SGLang writes for padding.

    Attributes:
        table: int32 `[requests, width]`, `req_to_kept`: slots of a request's kept rows, in their order. Row 0, which
            SGLang gives to padding, is 0 for ever.
        hidden: int64 `[requests]`, prompt rows of each request that are not kept.

    """

    table: Tensor
    hidden: Tensor

    def __init__(self, rule: KeptRule, pages: int, page_size: int, device: torch.device | str) -> None:
        self.rule, self.pages, self.page_size, self.device = rule, pages, page_size, device
        self._offsets = torch.arange(page_size, device=device)

    @property
    def size(self) -> int:
        """Slots that requests can hold."""
        return self.pages * self.page_size

    @property
    def free_pages(self) -> int:
        """Pages that no request holds."""
        return len(self._free)

    def bind(self, requests: int, longest: int) -> None:
        """Make the table, for rows 0 to `requests` - 1 and texts of up to `longest` tokens."""
        width = table_width(self.size, longest, self.page_size)
        self.table = torch.zeros(requests, width, dtype=torch.int32, device=self.device)
        self.hidden = torch.zeros(requests, dtype=torch.int64, device=self.device)
        self.clear()

    def clear(self) -> None:
        """All free."""
        self._free = torch.arange(1, self.pages + 1, dtype=torch.int64, device=self.device)

    def admit(self, row: int, hidden: int, pages: int) -> None:
        """Give the request of `row` its first pages."""
        self.hidden[row] = hidden
        self.table[row, : pages * self.page_size] = self._slots_of(self._take(pages)).flatten()

    def extend(self, rows: Tensor, places: Tensor) -> None:
        """Give each of `rows` one page more, as its page number `places`; both int64 `[n]`, on the device."""
        slots = self._slots_of(self._take(len(rows)))
        self.table.view(len(self.table), -1, self.page_size)[rows, places] = slots

    def release(self, row: int, pages: int) -> None:
        """Take all `pages` of a request back. Its table stays as it is until the row is given out again."""
        held = self.table[row, : pages * self.page_size : self.page_size]
        self._free = torch.cat((self._free, held.long() // self.page_size))

    def prompt_slots(self, row: int, prompt_tokens: int) -> Tensor:
        """int64 `[prompt_tokens]`: the slot of each row of a request's prompt, 0 where the row is not kept."""
        slots = torch.zeros(prompt_tokens, dtype=torch.int64, device=self.table.device)
        at = 0
        for start, stop in self.rule.ranges(prompt_tokens):
            slots[start:stop] = self.table[row, at : at + stop - start]
            at += stop - start
        return slots

    def of_batch(self, rows: Tensor, seq_lens: Tensor) -> tuple[Tensor, Tensor]:
        """What a decode batch of requests `rows` and lengths `seq_lens`, both `[batch]`, has here.

        Returns:
            kept lengths, and the slot of the newest token of each, both int64 `[batch]`.

        """
        lengths = (seq_lens - self.hidden[rows]).clamp_(min=0)
        return lengths, self.table[rows, (lengths - 1).clamp_(min=0)].long()

    def _take(self, pages: int) -> Tensor:
        taken, self._free = self._free[:pages], self._free[pages:]
        return taken

    def _slots_of(self, pages: Tensor) -> Tensor:
        """int32 `[pages, page_size]`."""
        return (pages[:, None] * self.page_size + self._offsets).int()
