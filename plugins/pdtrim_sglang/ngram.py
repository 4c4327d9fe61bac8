"""NGRAM on decode: SGLang 0.5.23 gives requests from prefill no draft input, and decode ends at the first one.

What NGRAM relays from one step to the next are the tokens that the last step accepted and that requests do not have
yet. Of a request that has just come there are none: it has prefill's token (speculative/ngram_worker.py,
`use_prev_tokens`). Without the overlapping scheduler nothing is relayed.
"""

from __future__ import annotations

from typing import Any

import torch


def first_draft_input(batch: Any, relay: Any, drafted: int) -> Any:
    """SGLang's NgramVerifyInput of requests that come from prefill; `drafted` tokens are verified in a step.

    With the overlapping scheduler it is written into SGLang's `relay` (FutureMap) too, as those of other drafts are.
    """
    from sglang.srt.managers.overlap_utils import RelayPayload
    from sglang.srt.speculative.ngram_info import NgramVerifyInput

    requests, device = len(batch.reqs), batch.seq_lens.device
    first = NgramVerifyInput(
        draft_token_num=drafted,
        new_seq_lens=batch.seq_lens,
        accept_tokens=torch.zeros(requests * drafted, dtype=torch.int32, device=device),
        accept_lens=torch.zeros(requests, dtype=torch.int32, device=device),
    )
    if batch.enable_overlap:
        first.future_indices = batch.req_pool_indices
        relay.publish(first.future_indices, batch.seq_lens)
        relay.stash(first.future_indices, RelayPayload.from_ngram(first))
    return first
