"""A worker's paged KV pool as the wire format sees it: one K and one V tensor a layer, rows by slot.

Of a pool of latents (MLA) they are the rope keys and the latents: views of its one tensor a layer, in halves.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from pdtrim_deploy.kvcache.key_offsets import KeyOffsets
from pdtrim_deploy.kvcache.pack import check, prepare
from pdtrim_deploy.plan import PDPlan
from pdtrim_sglang import threads
from pdtrim_sglang.draft import DraftRows, wire_digest
from pdtrim_sglang.state_slots import StateSlots

if TYPE_CHECKING:
    from pdtrim_sglang.kept_pool.pool import KeptKVPool


class Destinations(NamedTuple):
    """Where the tokens of a prompt, or of a part of it, lie in each layer's tensors.

    Attributes:
        slots: int64 `[groups, tokens]`, on the pool's device; row 0 holds SGLang's own slots.
        groups: by layer of the pool, the row that its slots are; None when row 0 is the only one.

    """

    slots: Tensor
    groups: tuple[int, ...] | None = None


class Buffers(NamedTuple):
    """Of all layers, as SGLang's pool names them; `dtype` is that of a row's values."""

    k_buffer: list[Tensor]
    v_buffer: list[Tensor]
    dtype: torch.dtype


@dataclass(frozen=True)
class WindowSlots:
    """Layers in SGLang's pool of windows, and where its slots are there; both are of its SWAKVPool.

    Attributes:
        layers: those whose rows are there.
        of_slot: int64 `[tokens + 1]`, by slot of whole layers; 0 of a token that no window holds.
        tokens: slots of whole layers, those for padding among them.

    """

    layers: frozenset[int]
    of_slot: Tensor
    tokens: int


@dataclass(frozen=True)
class PoolView:
    """Tensors `[slots, kv_heads, head_dim]` of every local layer, and the page size in tokens.

    With `latents` they are `[slots, 2, rope / 2]` and `[slots, 2, latent / 2]`, which count as one KV head.
    `cut` is SGLang's pool when its cut layers have slots of their own, `offsets` the plan's of these KV heads, and
    `first_head` the first of them, as the model counts. `draft` is the KV of a draft model, where one runs, and
    `windowed` says where the rows of layers with windows are, where SGLang has them in a pool of their own. `states`
    are those of layers with linear attention, which have no rows.
    """

    keys: list[Tensor]
    values: list[Tensor]
    page_size: int
    cut: KeptKVPool | None = None
    offsets: KeyOffsets | None = None
    first_head: int = 0
    draft: DraftRows | None = None
    windowed: WindowSlots | None = None
    latents: bool = False
    states: StateSlots | None = None
    _parts: dict[range, PoolView] = field(default_factory=dict, init=False, repr=False, compare=False)

    @classmethod
    def of(cls, pool: Any) -> PoolView:
        """View of SGLang's MHATokenToKVPool or MLATokenToKVPool (0.5.23), or of two of the former in its SWAKVPool.

        Of its HybridLinearKVPool, a view of the former, and of its MambaPool.

        Raises:
            RuntimeError: another kind of pool (another hybrid, HND, with scales), which the wire format does not know.

        """
        from sglang.srt.mem_cache.memory_pool import HybridLinearKVPool, MHATokenToKVPool, MLATokenToKVPool
        from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool

        from pdtrim_sglang.kept_pool.pool import KeptKVPool

        if type(pool) is SWAKVPool:
            return cls._of_windows(pool)
        if type(pool) is HybridLinearKVPool and not pool.use_mla:
            return replace(cls.of(pool.full_kv_pool), states=StateSlots.of(pool.mamba_pool))
        if type(pool) is MLATokenToKVPool and not pool.use_dsa:
            return cls._of_latents(pool)
        plain = type(pool) in (MHATokenToKVPool, KeptKVPool) and not (pool.use_hnd or pool.is_quantized_kv_cache)
        if not plain or pool.k_buffer[0].dim() != 3:
            raise RuntimeError(
                f"pdtrim: needs a plain KV pool of heads or of latents, this worker has {type(pool).__name__}: "
                "serve a Llama, Mistral, Qwen2 or Qwen3 bundle without KV-layout options"
            )
        # SGLang keeps fp8 rows as uint8.
        keys, values = ([rows.view(pool.dtype) for rows in side] for side in (pool.k_buffer, pool.v_buffer))
        return cls(keys, values, pool.page_size, pool if isinstance(pool, KeptKVPool) else None)

    @classmethod
    def _of_latents(cls, pool: Any) -> PoolView:
        """A slot holds a token's latent, then its rope key; SGLang keeps fp8 rows as uint8."""
        rows = [buffer.view(pool.dtype)[:, 0] for buffer in pool.kv_buffer]
        keys, values = (
            [row[:, part].unflatten(1, (2, -1)) for row in rows]
            for part in (slice(pool.kv_lora_rank, None), slice(pool.kv_lora_rank))
        )
        return cls(keys, values, pool.page_size, latents=True)

    @classmethod
    def _of_windows(cls, pool: Any) -> PoolView:
        if pool.request_window is not None:
            raise RuntimeError("pdtrim: windows in rings by request are not known: start without unified KV memory")
        whole, windows = cls.of(pool.full_kv_pool), cls.of(pool.swa_kv_pool)
        places = [pool.layers_mapping[layer] for layer in range(pool.layer_num)]
        keys, values = (
            [side[windowed][index] for index, windowed in places]
            for side in ((whole.keys, windows.keys), (whole.values, windows.values))
        )
        layers = frozenset(layer for layer, (_, windowed) in enumerate(places) if windowed)
        slots = WindowSlots(layers, pool.full_to_swa_index_mapping, whole.tokens)
        return cls(keys, values, pool.page_size, windowed=slots)

    @property
    def buffers(self) -> Buffers:
        """Of all layers, wherever they are."""
        return Buffers(self.keys, self.values, self.keys[0].dtype)

    def digest(self, plan: PDPlan) -> str:
        """What both workers must have in common (`draft.wire_digest`)."""
        return wire_digest(plan, self.draft)

    def draft_bytes(self, start: int, stop: int) -> int:
        """Bytes that tokens `[start, stop)` have in the draft model's pool."""
        return 0 if self.draft is None else self.draft.bytes_of(start, stop)

    @property
    def tokens(self) -> int:
        """SGLang's slots, those for padding among them."""
        if self.windowed is not None:
            return self.windowed.tokens
        return len(self.keys[0]) if self.cut is None else self.cut.size + self.page_size

    @property
    def kv_heads(self) -> int:
        """KV heads that this rank holds."""
        return 1 if self.latents else self.keys[0].shape[1]

    @property
    def heads(self) -> range:
        """They, as the model counts them."""
        return range(self.first_head, self.first_head + self.kv_heads)

    def of_heads(self, heads: range) -> PoolView:
        """A range of these heads, as the model counts them: views of the same tensors; itself when it is all."""
        if heads == self.heads:
            return self
        if heads not in self._parts:  # threads that ask at once may make it twice, and both are right
            first, stop = heads.start - self.first_head, heads.stop - self.first_head
            if not 0 <= first < stop <= self.kv_heads:
                raise ValueError(f"KV heads {heads.start}-{heads.stop - 1} are not among this rank's {self.heads}")
            keys, values = ([tensor[:, first:stop] for tensor in side] for side in (self.keys, self.values))
            offsets = None
            if self.offsets is not None:
                offsets = self.offsets.to(self.keys[0].device).heads(range(first, stop))
                self._settle()  # other threads read these copies on streams of their own
            self._parts[heads] = replace(self, keys=keys, values=values, offsets=offsets, first_head=heads.start)
        return self._parts[heads]

    def prepare(self, plan: PDPlan, *shares: range) -> None:
        """Compile what ranges of these heads are packed by, before the first of them travels; nobody waits for it.

        For all of them it is compiled at start-up. On a CPU one library serves all.
        """
        for count in {len(heads) for heads in shares} - {0, self.kv_heads}:
            if self.keys[0].is_cuda:
                part = self.of_heads(self.heads[:count])
                threads.start("kernel compiler", prepare, plan, part.keys[0], part.offsets)

    def slots(self, pages: Any, tokens: int) -> Tensor:
        """Slots (int64 `[tokens]`) of the first `tokens` tokens on `pages` (int array on the host).

        A GPU gets them by one copy that the host does not wait for.
        """
        device = self.keys[0].device
        first = torch.as_tensor(pages, dtype=torch.int64) * self.page_size
        slots = (first[:, None] + torch.arange(self.page_size, device=first.device)).flatten()[:tokens]
        if device.type == "cuda" and slots.is_cpu:
            slots = slots.pin_memory()
        return slots.to(device, non_blocking=True)

    def wait(self) -> None:
        """Until this thread's writes are done: SGLang reads the rows on a stream of its own.

        Raises:
            IndexError: a slot lay outside its pool.

        """
        self._settle()
        check(self.keys[0].device)

    def _settle(self) -> None:
        """Until the GPU has done what this thread has asked of it."""
        device = self.keys[0].device
        if device.type != "cpu":
            torch.get_device_module(device).current_stream(device).synchronize()

    def record_event(self) -> Any:
        """An event that the GPU reaches once the work this thread has queued so far is done; None on the CPU.

        SGLang's scheduler has a stream of its own, on which our work queues behind a forward pass that is under way.
        """
        device = self.keys[0].device
        return None if device.type == "cpu" else torch.get_device_module(device).current_stream(device).record_event()

    def after(self, *events: Any) -> None:
        """What this thread asks of the GPU from now on waits for `events`, of other streams; for None there is none."""
        device = self.keys[0].device
        for event in events:
            if event is not None:
                torch.get_device_module(device).current_stream(device).wait_event(event)

    def destinations(self, slots: Tensor, row: int | None = None) -> Destinations:
        """Where SGLang's `slots` of a prompt lie in each layer's tensors, as long as its request holds `row`.

        A token that a cut layer, or a window, does not keep has slot 0 there.
        """
        layers = range(len(self.keys))
        if self.windowed is not None:
            of_windows = self.windowed.of_slot[slots].long()
            groups = tuple(int(layer in self.windowed.layers) for layer in layers)
            return Destinations(torch.stack((slots, of_windows)), groups)
        if self.cut is None:
            return Destinations(slots[None])
        assert row is not None
        kept = self.cut.kept
        by_group = [group.prompt_slots(row, len(slots)) for group in kept.groups]
        groups = tuple(kept.of_layer.get(layer, -1) + 1 for layer in layers)
        return Destinations(torch.stack((slots, *by_group)), groups)


def row_view(pointer: int, length: int) -> memoryview:
    """Writable bytes at a host address, for SGLang's aux rows (on the host, or refused at start-up)."""
    import ctypes

    return memoryview((ctypes.c_ubyte * length).from_address(pointer)).cast("B")
