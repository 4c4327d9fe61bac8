"""A prefill worker's forward passes, followed layer by layer: only where rows are to leave during them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pdtrim_sglang.layerwise import LayerwiseSends


def follow(runner: Any, layerwise: LayerwiseSends) -> None:
    """Tell `layerwise` of each forward pass of SGLang's ModelRunner, and of each attention in it.

    An attention's backend is called outside of any graph, also where SGLang replays the rest of a layer from breakable
    ones; the batch that it is given then names no requests. A layer that is there for its K and V alone has no
    attention: its rows count as computed with the next one that has.
    """
    forward, attend, allocator = runner.forward, runner.attn_backend.forward, runner.token_to_kv_pool_allocator
    page_size, table = allocator.page_size, runner.req_to_token_pool

    def followed(batch: Any, *args: Any, **kwargs: Any) -> Any:
        if not batch.forward_mode.is_extend() or not batch.rids:
            return forward(batch, *args, **kwargs)

        def pages(place: int, start: int, stop: int) -> Any:
            row = batch.req_pool_indices[place : place + 1]  # on the device, which nobody waits for
            slots = allocator.translate_kv_indices_for_transfer(table.req_to_token[row, start:stop:page_size][0])
            return slots // page_size

        layerwise.begin(batch.rids, batch.extend_prefix_lens_cpu, batch.extend_seq_lens_cpu, pages)
        try:
            return forward(batch, *args, **kwargs)
        finally:
            layerwise.end()

    def attended(q: Any, k: Any, v: Any, layer: Any, *args: Any, **kwargs: Any) -> Any:
        result = attend(q, k, v, layer, *args, **kwargs)
        layerwise.computed(layer.layer_id)
        return result

    runner.forward, runner.attn_backend.forward = followed, attended
