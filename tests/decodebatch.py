"""A decode batch over SGLang's own KV pool, and attention written down plainly, for the tests of decode backends."""

import copy
import json
import random
from types import SimpleNamespace

import torch

from pdtrim_deploy.plan import KVSend, ModelShape, PDPlan

HEADS, KV_HEADS, DIM, CONTEXT, PAGES = 4, 2, 16, 40, 160


def make_plan(sends, kv_heads=KV_HEADS, head_dim=DIM):
    """A plan that drops nothing and sends `sends`."""
    shape = ModelShape(
        architecture="X", fingerprint="f", num_blocks=len(sends), num_kv_heads=kv_heads, head_dim=head_dim,
        kv_dtype="float32",
    )  # fmt: skip
    return PDPlan.dense(shape).with_kv(tuple(sends))


def sparse(n_first, n_last):
    return KVSend(mode="sparse", n_first=n_first, n_last=n_last)


def layer_of(index):
    """What SGLang's RadixAttention tells a backend."""
    return SimpleNamespace(
        layer_id=index, tp_q_head_num=HEADS, tp_k_head_num=KV_HEADS, tp_v_head_num=KV_HEADS, qk_head_dim=DIM,
        v_head_dim=DIM, head_dim=DIM, scaling=DIM**-0.5, is_cross_attention=False, sliding_window_size=-1,
        logit_cap=0.0, logit_capping_method="tanh", k_scale=None, v_scale=None, k_scale_float=None,
        v_scale_float=None, xai_temperature_len=-1,
    )  # fmt: skip


class Batch:
    """`requests` of (prompt, generated) tokens, all but the newest token of each in the pool, on pages of any place.

    The tokens of one request lie on its pages in order; pages of all requests are shuffled.
    """

    def __init__(self, folder, plan, requests, page_size=1, seed=0):
        from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool
        from sglang.srt.model_executor.forward_batch_info import ForwardMode

        self.plan, self.requests = plan, requests
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps({"pdtrim": plan.model_dump(mode="json")}))
        chance = random.Random(seed)
        torch.manual_seed(seed)
        pages = chance.sample(range(1, PAGES), PAGES - 1)
        table = torch.zeros(len(requests) + 3, CONTEXT, dtype=torch.int32)
        rows = torch.tensor(chance.sample(range(1, len(table)), len(requests)))
        for row, (prompt, generated) in zip(rows, requests, strict=True):
            length = prompt + generated
            own = [pages.pop() for _ in range(-(-length // page_size))]
            slots = torch.tensor([page * page_size + i for page in own for i in range(page_size)])
            table[row, :length] = slots[:length]
        self.pool = MHATokenToKVPool(
            PAGES * page_size, page_size, torch.float32, KV_HEADS, DIM, len(plan.kv), "cpu", enable_memory_saver=False
        )
        for buffer in (*self.pool.k_buffer, *self.pool.v_buffer):
            buffer.normal_()
        lengths = torch.tensor([sum(request) for request in requests])
        self.rows = SimpleNamespace(req_to_token=table, size=len(table))
        self.forward = SimpleNamespace(
            forward_mode=ForwardMode.DECODE, batch_size=len(requests), req_pool_indices=rows, seq_lens=lengths,
            seq_lens_sum=int(lengths.sum()), encoder_lens=None, out_cache_loc_is_physical=True,
            out_cache_loc=table[rows, lengths - 1].long(),
        )  # fmt: skip
        self.runner = SimpleNamespace(
            device="cpu", req_to_token_pool=self.rows, token_to_kv_pool=self.pool,
            server_args=SimpleNamespace(model_path=str(folder), disaggregation_mode="decode"),
        )  # fmt: skip
        self.queries = torch.randn(len(requests), HEADS * DIM)
        self.keys, self.values = (torch.randn(len(requests), KV_HEADS, DIM) for _ in range(2))

    def part(self, requests):
        """The forward batch of the last `requests` alone."""
        part = copy.copy(self.forward)
        part.batch_size, part.req_pool_indices = requests, self.forward.req_pool_indices[-requests:]
        part.seq_lens, part.out_cache_loc = self.forward.seq_lens[-requests:], self.forward.out_cache_loc[-requests:]
        part.seq_lens_sum = int(part.seq_lens.sum())
        return part

    def note_prompts(self):
        """What the hook on `_pre_alloc` does; after the backend has been made."""
        prompts = torch.tensor([prompt for prompt, _ in self.requests])
        self.rows.pdtrim_prompt_tokens[self.forward.req_pool_indices] = prompts

    def decode(self, backend):
        """Every layer's attention of one step by `backend`: `[layers, requests, heads * dim]`."""
        backend.init_forward_metadata(self.forward)
        step = (self.queries, self.keys, self.values)
        return torch.stack([backend.forward_decode(*step, layer_of(i), self.forward) for i in range(len(self.plan.kv))])

    def expected(self):
        """The same from the rule alone, one request, layer and head at a time."""
        out = torch.empty(len(self.plan.kv), len(self.requests), HEADS, DIM)
        for layer, send in enumerate(self.plan.kv):
            for i, (prompt, generated) in enumerate(self.requests):
                positions = [p for lo, hi in send.row_ranges(prompt) for p in range(lo, hi)]
                positions += range(prompt, prompt + generated)
                slots = self.rows.req_to_token[self.forward.req_pool_indices[i], positions].long()
                keys, values = self.pool.k_buffer[layer][slots], self.pool.v_buffer[layer][slots]
                keys[-1], values[-1] = self.keys[i], self.values[i]
                for head, query in enumerate(self.queries[i].view(HEADS, DIM)):
                    group = head * KV_HEADS // HEADS
                    weights = torch.softmax(keys[:, group] @ query * DIM**-0.5, 0)
                    out[layer, i, head] = weights @ values[:, group]
        return out.flatten(2)
