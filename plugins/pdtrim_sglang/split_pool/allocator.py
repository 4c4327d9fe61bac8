"""SGLang's allocators, giving slots of the sparse layers' pools beside their own. Subclasses of those in 0.5.23."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from sglang.srt.mem_cache.allocator.paged import PagedTokenToKVPoolAllocator
from sglang.srt.mem_cache.allocator.token import TokenToKVPoolAllocator
from torch import Tensor

from pdtrim_sglang.split_pool.kept_slots import KeptSlots
from pdtrim_sglang.split_pool.pool import SplitKVPool


class SplitAllocator:
    """What both have in common. Sizes and `available_size` are the full layers'.

    An allocation under `prompt` is of a request's tokens from its first on, of which each window keeps its own; any
    other is of generated tokens, which all are kept.
    """

    _kvcache: SplitKVPool
    _prompt_tokens: int | None = None

    @property
    def kept(self) -> tuple[KeptSlots, ...]:
        """The slots of every window."""
        return tuple(self._kvcache.kept.values())

    @contextmanager
    def prompt(self, tokens: int) -> Iterator[None]:
        """The next allocation is of a request with a prompt of `tokens`."""
        self._prompt_tokens = tokens
        try:
            yield
        finally:
            self._prompt_tokens = None

    def _short(self, new: int) -> bool:
        """Whether some window has too few slots for `new` more tokens."""
        prompt = self._prompt_tokens
        if prompt is None:
            return any(one.available < new for one in self.kept)
        return any(one.available < one.rows(prompt) + max(0, new - prompt) for one in self.kept)

    def _keep(self, slots: Tensor | None) -> Tensor | None:
        if slots is not None:
            prompt = self._prompt_tokens
            for one in self.kept:
                one.take(slots if prompt is None else one.of_prompt(slots, prompt))
        return slots

    def clear(self) -> None:
        """All free, in every pool."""
        super().clear()  # type: ignore[misc]
        for one in self.kept:
            one.clear()

    def check_decode_capacity(self, *, num_tokens: int, requests: Any = None, **others: Any) -> bool:
        """Whether the next decode step fits: each of `requests` needs a slot of every window."""
        new = num_tokens if requests is None else len(requests)
        fits: bool = super().check_decode_capacity(num_tokens=num_tokens, requests=requests, **others)  # type: ignore[misc]
        return fits and not self._short(new)

    def max_new_tokens_for_memory(self, input_tokens: int, max_new_tokens: int, **others: Any) -> int | None:
        """How long a request's answer can be if it has all pools for itself."""
        most: int | None = super().max_new_tokens_for_memory(input_tokens, max_new_tokens, **others)  # type: ignore[misc]
        room = min(one.size - one.rows(input_tokens) for one in self.kept) - 1
        return None if most is None else max(0, min(most, room))

    def verify_byte_accounting(self) -> list[str]:
        """What leaked; SGLang asks when no request is left, and then every slot must be free."""
        return [
            f"pdtrim: layers that keep {one.window.n_first} + {one.window.n_last} prompt tokens hold "
            f"{one.size - one.available} of {one.size} slots with no request left"
            for one in self.kept
            if one.available != one.size
        ]


class SplitTokenAllocator(SplitAllocator, TokenToKVPoolAllocator):
    """Page size 1."""

    def alloc(self, need_size: int) -> Tensor | None:
        """Slots of `need_size` tokens, None when there are too few."""
        return None if self._short(need_size) else self._keep(super().alloc(need_size))

    def free(self, free_index: Tensor) -> None:
        """Now, or when the group of frees ends, which comes here again."""
        if self.free_group is None and free_index.numel():
            for one in self.kept:
                one.give_back(free_index)
        super().free(free_index)


class SplitPagedAllocator(SplitAllocator, PagedTokenToKVPoolAllocator):
    """Page size above 1: pages are the full layers' alone."""

    def alloc(self, need_size: int) -> Tensor | None:
        raise NotImplementedError("pdtrim: whole pages are not allocated under a split decode pool")

    def alloc_extend(self, *args: Any, extend_num_tokens: int, **others: Any) -> Tensor | None:
        """Slots of a request's first `extend_num_tokens` tokens, None when there are too few."""
        if self._short(extend_num_tokens):
            return None
        return self._keep(super().alloc_extend(*args, extend_num_tokens=extend_num_tokens, **others))

    def alloc_decode(self, seq_lens: Tensor, seq_lens_cpu: Tensor, last_loc: Tensor) -> Tensor | None:
        """One slot a request, None when there are too few."""
        return (
            None if self._short(len(seq_lens)) else self._keep(super().alloc_decode(seq_lens, seq_lens_cpu, last_loc))
        )

    def _release_page_ids(self, *page_ids: Tensor) -> None:
        offsets = torch.arange(self.page_size, device=self.device)
        for pages in page_ids:
            slots = (pages[:, None] * self.page_size + offsets).flatten()
            for one in self.kept:
                one.give_back(slots)
        super()._release_page_ids(*page_ids)


def split_allocator(stock: Any) -> Any:
    """Ours in the place of SGLang's `stock` over a SplitKVPool, which is new and has given out nothing.

    Raises:
        RuntimeError: `stock` is of a kind that we do not know.

    """
    given = {name: getattr(stock, name) for name in ("dtype", "device", "need_sort")} | {"kvcache": stock.get_kvcache()}
    if type(stock) is TokenToKVPoolAllocator:
        return SplitTokenAllocator(stock.size, **given)
    if type(stock) is PagedTokenToKVPoolAllocator:
        return SplitPagedAllocator(stock.size, stock.page_size, **given)
    raise RuntimeError(f"pdtrim: a decode pool cannot be split under SGLang's {type(stock).__name__}")
