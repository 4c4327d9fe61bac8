"""Index arithmetic of sparse decode attention, shared by all backends."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pdtrim_deploy.plan import PDPlan


@dataclass(frozen=True)
class Window:
    """First and last prompt tokens that a sparse layer sees."""

    n_first: int
    n_last: int


def layer_windows(plan: PDPlan) -> dict[int, Window]:
    """Decode layer -> window, for the sparse layers only."""
    return {layer: Window(send.n_first, send.n_last) for layer, send in enumerate(plan.kv) if send.mode == "sparse"}


def hidden_tokens(seq_lens: Tensor, prompt_tokens: Tensor, window: Window) -> Tensor:
    """Tokens `[batch]` between the first and the last ones of each request's prompt.

    A row of the pool may say more of a prompt than there is: SGLang pads batches for CUDA graphs with requests of one
    token, and a request that has ended runs once more, when its row may be another's. Such a one sees a token or more.
    """
    prompts = torch.minimum(prompt_tokens, seq_lens - 1)
    return (prompts - window.n_first - window.n_last).clamp(min=0)


def compact_table(
    req_to_token: Tensor, rows: Tensor, seq_lens: Tensor, prompt_tokens: Tensor, window: Window
) -> tuple[Tensor, Tensor]:
    """Pool slots that each request of a decode batch attends to in layers of one window.

    Args:
        req_to_token: `[pool_rows, max_context]`, slot of each token.
        rows, seq_lens: `[batch]`, row and length (prompt and generated) of each request.
        prompt_tokens: `[batch]`; 0 for a request without prompt KV from prefill, which then sees everything.

    Returns:
        slots `[batch, longest]` in token order, padded, and lengths `[batch]`.

    """
    hidden = hidden_tokens(seq_lens, prompt_tokens, window)
    lengths = seq_lens - hidden
    column = torch.arange(int(lengths.max()), device=rows.device)[None, :]
    position = column + hidden[:, None] * (column >= window.n_first)
    position = torch.minimum(position, (seq_lens - 1)[:, None])
    return req_to_token[rows[:, None].long(), position.long()], lengths


@dataclass(frozen=True)
class KVIndices:
    """A batch's table without padding, as SGLang's FlashInfer backend takes it, in pages of one token.

    Request `i` attends to `indices[indptr[i] : indptr[i + 1]]`: SGLang 0.5.23 hands the kernel slots of single tokens
    whatever `--page-size` is, so a window may begin and end inside a page.

    Attributes:
        indptr: int32 `[batch + 1]`.
        indices: int64 `[indptr[-1]]`; FlashInfer takes int32.
        last_page_len: int32 `[batch]`, tokens on each request's last page: 1.

    """

    indptr: Tensor
    indices: Tensor
    last_page_len: Tensor


def kv_indices(slots: Tensor, lengths: Tensor) -> KVIndices:
    """The same as `slots` `[batch, longest]` and `lengths` `[batch]` of `compact_table`."""
    indptr = torch.zeros(len(lengths) + 1, dtype=torch.int32, device=slots.device)
    indptr[1:] = lengths.cumsum(0)
    column = torch.arange(slots.shape[1], device=slots.device)
    return KVIndices(
        indptr=indptr,
        indices=slots[column[None, :] < lengths[:, None]].long(),
        last_page_len=torch.ones_like(indptr[1:]),
    )
