"""A prefill worker's forward passes, followed layer by layer: only where rows are to leave during them.

Its radix cache is followed too, which may give a request other pages before its chunk is handed over.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from pdtrim_sglang.layerwise import LayerwiseSends


class Movable(Protocol):
    """Who must hear that pages of SGLang's request `rid` move; then `pages(start, stop)` are those of its tokens."""

    def moving(self, rid: str, pages: Callable[[int, int], Any]) -> AbstractContextManager[None]: ...


def follow_pages(runner: Any, tree: Any, movable: Movable) -> None:
    """Tell `movable` of each exchange of a request's pages by the prefix cache; without a cache none ever moves."""
    pages_of = _pages_of(runner)
    if not getattr(tree, "disable", True):  # others than SGLang's own cache do not ask `insert_rows`
        tree.pdtrim_moving = lambda req: movable.moving(req.rid, lambda *tokens: pages_of(req.kv.req_pool_idx, *tokens))


def _pages_of(runner: Any) -> Callable[[Any, int, int], Any]:
    """Pages, int32, of tokens `[start, stop)` of the request that holds a row of SGLang's `req_to_token`."""
    allocator, table = runner.token_to_kv_pool_allocator, runner.req_to_token_pool

    def pages_of(row: Any, start: int, stop: int) -> Any:
        slots = table.req_to_token[row, start : stop : allocator.page_size].flatten()
        return allocator.translate_kv_indices_for_transfer(slots) // allocator.page_size

    return pages_of


def follow(runner: Any, tree: Any, layerwise: LayerwiseSends) -> None:
    """Tell `layerwise` of each forward pass of SGLang's ModelRunner, of each attention in it, and of moved pages.

    An attention's backend is called outside of any graph, also where SGLang replays the rest of a layer from breakable
    ones; the batch that it is given then names no requests. A layer that is there for its K and V alone has no
    attention: its rows count as computed with the next one that has, or at the end.

    Raises:
        RuntimeError: the prefix cache is another one than SGLang's own, and would not tell of moved pages.

    """
    from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache

    if not tree.disable and not isinstance(tree, UnifiedRadixCache):
        raise RuntimeError(
            f"pdtrim: {type(tree).__name__} may move rows that leave by layer, and does not say so: start prefill with "
            "--disable-radix-cache, or serve without --send-by-layer"
        )
    forward, attend, pages_of = runner.forward, runner.attn_backend.forward, _pages_of(runner)

    def followed(batch: Any, *args: Any, **kwargs: Any) -> Any:
        if not batch.forward_mode.is_extend() or not batch.rids:
            return forward(batch, *args, **kwargs)

        def pages(place: int, start: int, stop: int) -> Any:
            row = batch.req_pool_indices[place : place + 1]  # on the device, which nobody waits for
            return pages_of(row, start, stop)

        layerwise.begin(batch.rids, batch.extend_prefix_lens_cpu, batch.extend_seq_lens_cpu, pages)
        try:
            return forward(batch, *args, **kwargs)
        finally:
            layerwise.end()

    def attended(q: Any, k: Any, v: Any, layer: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
        result = attend(q, k, v, layer, batch, *args, **kwargs)
        layerwise.computed(layer.layer_id)
        return result

    runner.forward, runner.attn_backend.forward = followed, attended
    follow_pages(runner, tree, layerwise)
