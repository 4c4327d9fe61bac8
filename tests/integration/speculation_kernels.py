"""For workers that draft tokens: torch forms of the kernels that SGLang 0.5.23 has for CPUs in an unpublished package.

Imported in the worker's process before SGLang starts. The scheduler, the drafts (NGRAM's corpus, EAGLE's model), the
verification and the pools are SGLang's; the kernels' results are those of its Triton forms for other devices
(sglang/kernels/ops/speculative). torch_native attention learns to verify drafted tokens, as SGLang's for AMX does.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


def compute_by_torch() -> None:
    """From now on this process, and those that it forks, have the kernels."""
    missing = ModuleType("sgl_kernel.speculative")
    missing.reconstruct_indices_from_tree_mask = links_of_mask  # type: ignore[attr-defined]
    sys.modules[missing.__name__] = missing
    from sglang.kernels.ops.speculative import cache_locs, eagle, spec_tree
    from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
    from sglang.srt.mem_cache import allocation, memory_pool
    from sglang.srt.speculative.draft_utils import DraftBackendFactory

    cache_locs.assign_extend_cache_locs_cpu = gather_slots
    cache_locs.assign_draft_cache_locs_contiguous_cpu = gather_draft_slots
    allocation.assign_req_to_token_pool_cpu = scatter_slots
    eagle.fill_accept_out_cache_loc_cpu = pack_accepted
    eagle.fill_bonus_tokens_cpu = last_accepted
    spec_tree.sgl_build_tree_kernel_efficient_cpu = build_chain
    spec_tree.sgl_verify_tree_greedy_cpu = verify_greedily
    pool = memory_pool.MHATokenToKVPool
    pool._init_kv_copy_and_warmup = lambda self: None
    pool._move_kv_cache_impl = lambda self, target, source: memory_pool.move_kv_cache_native(
        self.k_buffer, self.v_buffer, target, source
    )
    extend = TorchNativeAttnBackend.forward_extend
    TorchNativeAttnBackend.forward_extend = lambda self, *states, **options: (
        verify if states[4].forward_mode.is_target_verify() else extend
    )(self, *states, **options)
    DraftBackendFactory.create_draft_extend_backend = lambda self: TorchNativeAttnBackend(self.draft_model_runner)


def verify(
    self: Any, q: Tensor, k: Tensor, v: Tensor, layer: Any, batch: Any, save_kv_cache: bool = True, **_: Any
) -> Tensor:
    """TorchNativeAttnBackend's for drafted tokens: each attends to all before the draft and to its ancestors in it."""
    from sglang.srt.mem_cache.memory_pool import KVWriteLoc

    if save_kv_cache:
        self.token_to_kv_pool.set_kv_buffer(layer, KVWriteLoc(batch.out_cache_loc, self.swa_out_cache_loc), k, v)
    keys, values = (read(layer.layer_id) for read in (
        self.token_to_kv_pool.get_key_buffer, self.token_to_kv_pool.get_value_buffer
    ))  # fmt: skip
    count = batch.spec_info.draft_token_num
    queries = q.view(-1, count, layer.tp_q_head_num, layer.qk_head_dim)
    ancestors = batch.spec_info.custom_mask.view(-1)[: len(queries) * count * count].view(-1, count, count).bool()
    results = []
    for request, (row, before) in enumerate(zip(batch.req_pool_indices.tolist(), batch.seq_lens.tolist(), strict=True)):
        slots = self.req_to_token_pool.req_to_token[row, : before + count]
        seen = torch.cat((torch.ones(count, before, dtype=torch.bool), ancestors[request]), 1)
        heads = (rows.transpose(0, 1)[None] for rows in (queries[request], keys[slots].to(q), values[slots].to(q)))
        result = scaled_dot_product_attention(*heads, attn_mask=seen, enable_gqa=True, scale=layer.scaling)
        results.append(result[0].transpose(0, 1).flatten(1))
    return torch.cat(results)


def gather_slots(rows: Tensor, table: Tensor, start: Tensor, stop: Tensor, out: Tensor, width: int) -> None:
    """`out` begins with the table's slots `[start, stop)` of each row, one after the other."""
    slots = [table[row, a:b] for row, a, b in zip(rows.tolist(), start.tolist(), stop.tolist(), strict=True)]
    packed = torch.cat(slots)
    out[: len(packed)] = packed


def gather_draft_slots(
    rows: Tensor, table: Tensor, start: Tensor, out: Tensor, width: int, topk: int, count: int
) -> None:
    """The `topk * count` slots of each row from `start` on."""
    gather_slots(rows, table, start, start + topk * count, out, width)


def scatter_slots(rows: Tensor, table: Tensor, start: Tensor, stop: Tensor, slots: Tensor, width: int) -> None:
    """The opposite: into the table."""
    at = 0
    for row, a, b in zip(rows.tolist(), start.tolist(), stop.tolist(), strict=True):
        table[row, a:b] = slots[at : at + b - a]
        at += b - a


def pack_accepted(accepted: Tensor, slots: Tensor, out: Tensor) -> None:
    """`out` begins with the slots at indices that are not -1."""
    chosen = slots[accepted.flatten()[accepted.flatten() >= 0].long()]
    out[: len(chosen)] = chosen


def last_accepted(tokens: Tensor, lengths: Tensor, out: Tensor, width: int) -> None:
    out.copy_(tokens.view(-1)[torch.arange(len(lengths)) * width + lengths.long() - 1])


def links_of_mask(
    mask: Tensor,
    lengths: Tensor,
    positions: Tensor,
    index: Tensor,
    child: Tensor,
    sibling: Tensor,
    batch: int,
    count: int,
) -> None:
    """Of trees whose `mask[b, i, j]` says that node j is i's ancestor: positions, numbers, first children, siblings."""
    ancestors = mask.view(-1)[: batch * count * count].view(batch, count, count).bool().tril(-1)
    positions.view(-1)[: batch * count] = (ancestors.sum(-1) + lengths.long()[:, None]).flatten()
    index.view(batch, count).copy_(torch.arange(batch * count).view(batch, count))
    _link(ancestors, child.view(batch, count), sibling.view(batch, count))


def _link(ancestors: Tensor, child: Tensor, sibling: Tensor) -> None:
    child.fill_(-1)
    sibling.fill_(-1)
    for tree, children, siblings in zip(ancestors, child, sibling, strict=True):
        for node in range(len(tree) - 1, 0, -1):
            parents = tree[node].nonzero()
            if len(parents):
                parent = int(parents[-1])
                siblings[node] = children[parent]
                children[parent] = node


def build_chain(
    parents: Tensor, selected: Tensor, lengths: Tensor, mask: Tensor, positions: Tensor, index: Tensor, child: Tensor,
    sibling: Tensor, topk: int, depth: int, count: int, mode: int,
) -> None:  # fmt: skip
    """EAGLE's tree of one branch, its mask among drafted tokens alone (QLEN_ONLY)."""
    assert (topk, int(mode)) == (1, 1), "only a chain"
    batch = len(lengths)
    chain = torch.ones(count, count, dtype=torch.bool).tril().expand(batch, count, count)
    mask.view(-1)[: chain.numel()] = chain.flatten()
    links_of_mask(chain.contiguous(), lengths, positions, index, child, sibling, batch, count)


def verify_greedily(
    predicts: Tensor, accept_index: Tensor, accept_token_num: Tensor, candidates: Tensor, retrive_index: Tensor,
    retrive_next_token: Tensor, retrive_next_sibling: Tensor, target_predict: Tensor,
) -> None:  # fmt: skip
    """Go down each tree along the target's own tokens; what it says behind the last of them is the bonus."""
    width = candidates.shape[1]
    for request in range(len(candidates)):
        node, at = 0, int(retrive_index[request, 0])
        accept_index[request, 0], accepted = at, 0
        while accepted + 1 < accept_index.shape[1]:
            token = int(target_predict[at // width, at % width])
            node = int(retrive_next_token[request, node])
            while node != -1 and int(candidates[request, node]) != token:
                node = int(retrive_next_sibling[request, node])
            if node == -1:
                break
            predicts[at], accepted = token, accepted + 1
            at = int(retrive_index[request, node])
            accept_index[request, accepted] = at
        accept_token_num[request] = accepted
        predicts[at] = target_predict[at // width, at % width]
