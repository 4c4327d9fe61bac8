"""torch_native on a CPU with sinks, and in SGLang's pool of windows: against transformers' gpt-oss attention."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("sglang", reason="needs the serve environment")

from decodeworker import GARBAGE, sglang
from pdtrim_sglang.attention.factory import TorchFactory
from pdtrim_sglang.cpu import torch_attention
from pdtrim_sglang.cpu.torch_attention import TorchAttention, attend
from sglang.srt.layers.attention import torch_native_backend
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.mem_cache.allocator.swa import SWATokenToKVPoolAllocator
from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from torch.nn.functional import scaled_dot_product_attention
from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward

HEADS, KV_HEADS, DIM, SCALING, WINDOW, PAGE = 6, 2, 16, 0.3, 9, 4
OFF = torch.full((HEADS,), -torch.inf)
LAYERS = (WINDOW - 1, -1)  # as SGLang counts windows: tokens before the query


@pytest.fixture(scope="module", autouse=True)
def server():
    with sglang():
        yield


def transformers_attention(query, keys, values, window, sinks):
    """Of the last tokens of a text: query `[queries, heads, dim]`; keys, values `[tokens, kv_heads, dim]`."""
    distance = torch.arange(len(keys) - len(query), len(keys))[:, None] - torch.arange(len(keys))
    seen = (distance >= 0) & ((distance <= window) | (window == -1))
    mask = torch.zeros(seen.shape).masked_fill(~seen, -torch.inf)[None, None]
    module = SimpleNamespace(num_key_value_groups=HEADS // KV_HEADS, sinks=sinks, training=False)
    heads_first = (rows.transpose(0, 1)[None] for rows in (query, keys, values))
    return eager_attention_forward(module, *heads_first, mask, SCALING)[0][0]


@pytest.mark.parametrize("window", [-1, 3])
@pytest.mark.parametrize("queries", [1, 7])
def test_a_sink_is_a_logit_without_a_value(queries, window):
    torch.manual_seed(0)
    query, (keys, values) = torch.randn(queries, HEADS, DIM), torch.randn(2, 12, KV_HEADS, DIM)
    sinks = 2 * torch.randn(HEADS)
    expected = transformers_attention(query, keys, values, window, sinks)
    torch.testing.assert_close(attend(query, keys, values, SCALING, window, sinks), expected, rtol=1e-5, atol=1e-6)
    none = attend(query, keys, values, SCALING, window, None)
    torch.testing.assert_close(
        none,
        transformers_attention(query, keys, values, window, OFF),
        rtol=1e-5,
        atol=1e-6,
    )
    assert (none - expected).abs().max() > 1e-2


class Worker:
    """SGLang's pools of whole layers and of windows, and attention of one layer of each, in `backend`."""

    def __init__(self, make, requests=3, tokens=160, window_tokens=96):
        heads = KV_HEADS, DIM
        self.pool = SWAKVPool(tokens, window_tokens, PAGE, torch.float32, *heads, [0], [1], "cpu")
        self.allocator = SWATokenToKVPoolAllocator(
            tokens, window_tokens, PAGE, torch.float32, "cpu", self.pool, need_sort=False
        )
        for buffer in (self.pool.full_kv_pool, self.pool.swa_kv_pool):
            for rows in (*buffer.k_buffer, *buffer.v_buffer):
                rows.fill_(GARBAGE)
        self.allocator.alloc_extend_swa_tail(*self._request(0, 12), 12, 4)  # slots of the two differ from here on
        self.table = torch.zeros(requests, 64, dtype=torch.int32)
        runner = SimpleNamespace(
            device="cpu", req_to_token_pool=SimpleNamespace(req_to_token=self.table), token_to_kv_pool=self.pool
        )
        self.backend = make(runner)
        self.layers = [
            RadixAttention(HEADS, DIM, SCALING, KV_HEADS, layer_id=layer, sliding_window_size=window)
            for layer, window in enumerate(LAYERS)
        ]
        self.texts = [torch.zeros(2, len(LAYERS), 0, KV_HEADS, DIM) for _ in range(requests)]

    def _request(self, before, after, last=-1):
        start, stop = torch.tensor([before]), torch.tensor([after])
        return start, start, stop, stop, torch.tensor([last])

    def run(self, counts, sinks):
        """So many tokens more of each request, in one batch; what each layer's attention gave, and what it should."""
        slots, before = [], [text.shape[2] for text in self.texts]
        for row, (count, first) in enumerate(zip(counts, before, strict=True)):
            last = int(self.table[row, first - 1]) if first else -1
            taken = self.allocator.alloc_extend(*self._request(first, first + count, last), count)
            self.table[row, first : first + count] = taken.int()
            slots.append(taken)
        lengths, new = torch.tensor(before) + torch.tensor(counts), sum(counts)
        decode = all(count == 1 for count in counts)
        batch = SimpleNamespace(
            forward_mode=ForwardMode.DECODE if decode else ForwardMode.EXTEND,
            req_pool_indices=torch.arange(len(counts)),
            seq_lens=lengths, extend_prefix_lens=torch.tensor(before), extend_seq_lens=torch.tensor(counts),
            out_cache_loc=torch.cat(slots), encoder_lens=None,
        )  # fmt: skip
        self.backend.init_forward_metadata(batch)
        answers, expected = [], []
        rows = torch.randn(2, len(LAYERS), new, KV_HEADS, DIM)
        for row, part in enumerate(rows.split(counts, 2)):
            self.texts[row] = torch.cat((self.texts[row], part), 2)
        options = {} if sinks is None else {"sinks": sinks}
        for layer, window in enumerate(LAYERS):
            query = torch.randn(new, HEADS * DIM)
            answers.append(self.backend.forward(query, *rows[:, layer], self.layers[layer], batch, True, **options))
            of_each = zip(query.view(new, HEADS, DIM).split(counts), self.texts, strict=True)
            outputs = [
                transformers_attention(part, *text[:, layer], window, OFF if sinks is None else sinks)
                for part, text in of_each
            ]
            expected.append(torch.cat(outputs).flatten(1))
        return answers, expected


@pytest.mark.parametrize("sinks", [None, torch.linspace(-2, 3, HEADS)], ids=["no sinks", "sinks"])
def test_chunks_and_steps_of_several_requests_in_both_pools(sinks):
    torch.manual_seed(1)
    worker = Worker(TorchFactory(lambda runner: pytest.fail("SGLang's own")))
    assert type(worker.backend) is TorchAttention
    for counts in ([5, 17, 2], [12, 3, 9], [1, 1, 1], [1, 1, 1]):
        for answer, expected in zip(*worker.run(counts, sinks), strict=True):
            torch.testing.assert_close(answer, expected, rtol=1e-5, atol=1e-5)


def test_a_short_tail_computes_its_own_queries_alone(monkeypatch):
    """Of 3 tokens behind 20 SGLang's own would compute 23; of longer chunks it computes fewer scores than ours."""
    torch.manual_seed(1)
    worker, computed = Worker(TorchAttention, requests=2), []
    worker.backend.own_queries = True

    def counted(query, *args, **named):
        computed.append(query.shape[-2])
        return scaled_dot_product_attention(query, *args, **named)

    monkeypatch.setattr(torch_attention, "scaled_dot_product_attention", counted)
    monkeypatch.setattr(torch_native_backend, "scaled_dot_product_attention", counted)
    chunks = {(20, 12): [20, 12], (3, 1): [3, 1], (40, 2): [63, 15], (1, 2): [1, 2]}
    for counts, expected_queries in chunks.items():
        computed.clear()
        answers, expected = worker.run(counts, None)
        torch.testing.assert_close(answers[1], expected[1], rtol=1e-5, atol=1e-5)
        assert computed[-len(counts) :] == expected_queries


def test_other_chunks_are_sglangs_own(monkeypatch):
    """Drafted tokens among them, whose batch does not say where they begin."""
    worker, called = Worker(TorchAttention), []
    monkeypatch.setattr(TorchNativeAttnBackend, "forward_extend", lambda *args, **_: called.append(args))
    for before in (None, torch.tensor([20])):
        batch = SimpleNamespace(extend_prefix_lens=before, extend_seq_lens=torch.tensor([4]))
        worker.backend.forward_extend(torch.zeros(4, HEADS * DIM), None, None, worker.layers[1], batch)
    assert len(called) == 2


def test_sglangs_own_misreads_windows_and_takes_no_sinks():
    """Remove ours when this no longer holds."""
    torch.manual_seed(1)
    worker = Worker(TorchNativeAttnBackend)
    (windowed, whole), expected = worker.run([5, 17, 2], None)
    torch.testing.assert_close(whole, expected[1], rtol=1e-5, atol=1e-5)
    assert (windowed - expected[0]).abs().max() > 1
    with pytest.raises(TypeError, match="sinks"):
        worker.run([1, 1, 1], torch.zeros(HEADS))


def test_on_other_devices_sglangs_own_is_made():
    runner = SimpleNamespace(device="cuda")
    assert TorchFactory(lambda runner: [runner])(runner) == [runner]
