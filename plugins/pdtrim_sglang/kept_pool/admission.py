"""Whether the pools of cut layers have room for one more request on a decode worker.

As SGLang's own admission (`DecodePreallocQueue`, disaggregation/decode.py, 0.5.23): what the prompt takes at once, and
for it and each request under way `--num-reserved-decode-tokens` of its answer, or what is left of that.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


def has_room(queue: Any, req: Any, prompt_tokens: int, generated: int = 0) -> bool:
    """Whether `req`, which waits in `queue` with `generated` tokens, can be given pages; asked again later when not."""
    kept = queue.token_to_kv_pool_allocator.get_kvcache().kept
    needed = kept.pages_for(prompt_tokens, generated + _growth(queue, req))
    under_way = list(_under_way(queue))
    if not under_way:  # one that would need more than there is goes alone, and ends where there is no more
        needed = [min(pages, group.pages) for pages, group in zip(needed, kept.groups, strict=True)]
    others = sum(-(-_growth(queue, other) // kept.page_size) for other in under_way)
    return all(group.free_pages >= pages + others for group, pages in zip(kept.groups, needed, strict=True))


def _growth(queue: Any, req: Any) -> int:
    left: int = req.sampling_params.max_new_tokens - len(req.output_ids)
    return max(0, min(queue.num_reserved_decode_tokens, left))


def _under_way(queue: Any) -> Iterator[Any]:
    """Requests that hold slots, each once."""
    scheduler, last = queue.scheduler, queue.scheduler.last_batch
    yield from scheduler.running_batch.reqs
    yield from (waiting.req for waiting in queue.transfer_queue.queue)
    yield from (entry.req for entry in queue.queue if entry.req.kv.holds_kv)  # those of this pass
    yield from scheduler.waiting_queue
    if last and last.forward_mode.is_prebuilt():  # of no queue until it is merged into the running batch
        yield from last.reqs
