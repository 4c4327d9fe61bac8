"""Sparse layers in pools of their own: the same answers as from one pool, in the memory that was promised."""

import json
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("sglang", reason="needs the serve environment")

from decodebatch import CONTEXT, DIM, HEADS, KV_HEADS, layer_of, make_plan, sparse

from pdtrim_deploy.kvcache.layout import chunk_layout
from pdtrim_deploy.kvcache.pack import pack
from pdtrim_deploy.plan import KVSend
from pdtrim_deploy.worker.decode_pool import SplitPool

TOKENS, ROWS = 128, 5
ROW_BYTES = 2 * KV_HEADS * DIM * 4


def make_pool(plan, page_size, split, tokens=TOKENS):
    from pdtrim_sglang.split_pool.allocator import split_allocator
    from pdtrim_sglang.split_pool.pool import SplitKVPool
    from sglang.srt.mem_cache.allocator.paged import PagedTokenToKVPoolAllocator
    from sglang.srt.mem_cache.allocator.token import TokenToKVPoolAllocator
    from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

    shape = {
        "page_size": page_size, "dtype": torch.float32, "head_num": KV_HEADS, "head_dim": DIM,
        "layer_num": len(plan.kv), "device": "cpu", "enable_memory_saver": False,
    }  # fmt: skip
    pool = SplitKVPool(tokens, **shape, plan=plan, split=split) if split else MHATokenToKVPool(tokens, **shape)
    given = {"dtype": torch.float32, "device": "cpu", "kvcache": pool, "need_sort": True}
    stock = (
        TokenToKVPoolAllocator(tokens, **given)
        if page_size == 1
        else PagedTokenToKVPoolAllocator(tokens, page_size, **given)
    )
    return split_allocator(stock) if split else stock


class Decoder:
    """What a decode worker does with its pool, with SGLang's allocators and attention; prefill's rows come packed."""

    def __init__(self, folder, plan, page_size, split=None):
        from pdtrim_sglang.attention.torch_native import SparseTorchNativeBackend
        from pdtrim_sglang.pool import PoolView

        (folder / "config.json").write_text(json.dumps({"pdtrim": plan.model_dump(mode="json")}))
        self.plan, self.page_size = plan, page_size
        self.allocator = make_pool(plan, page_size, split)
        self.pool = self.allocator.get_kvcache()
        for buffer in (*self.pool.k_buffer, *self.pool.v_buffer):
            buffer.fill_(1e3)  # what nobody may read
        self.view = PoolView.of(self.pool)
        self.table, self.lengths = torch.zeros(ROWS, CONTEXT, dtype=torch.int32), {}
        rows = SimpleNamespace(req_to_token=self.table)
        args = SimpleNamespace(model_path=str(folder), disaggregation_mode="decode")
        self.backend = SparseTorchNativeBackend(
            SimpleNamespace(device="cpu", req_to_token_pool=rows, token_to_kv_pool=self.pool, server_args=args)
        )
        self.prompts = getattr(rows, "pdtrim_prompt_tokens", {})

    def admit(self, row, keys, values):
        """A request whose prompt has these rows, `[layers, tokens, heads, dim]`; False when there is no room."""
        import contextlib

        from pdtrim_sglang.protocol import ChunkHeader
        from pdtrim_sglang.rooms import DecodeRoom

        n = keys.shape[1]
        with getattr(self.allocator, "prompt", contextlib.nullcontext)(n):
            slots = self.allocate_prompt(n)
        if slots is None:
            return False
        self.table[row, :n], self.prompts[row], self.lengths[row] = slots, n, n
        pages = (slots[:: self.page_size] // self.page_size).numpy()
        assert torch.equal(self.view.slots(pages, n), slots)
        room = DecodeRoom(1, n, 0, self.view.destinations(slots), 0)
        aux = SimpleNamespace(write=lambda index, data: None)
        for start, stop in ((0, n // 2), (n // 2, n)):
            packed = pack(chunk_layout(self.plan, n, start, stop), keys, values, torch.arange(start, stop))
            header = ChunkHeader(
                digest=bytes(32), room=1, rank=0, prompt_tokens=n, start=start, stop=stop, aux_bytes=0,
                payload_bytes=len(packed), last=stop == n,
            )  # fmt: skip
            assert room.take(self.plan, self.view, aux, header, packed, memoryview(b"")) == ""
        return True

    def allocate_prompt(self, n):
        if self.page_size == 1:
            return self.allocator.alloc(n)
        zero, length = torch.tensor([0]), torch.tensor([n])
        return self.allocator.alloc_extend(
            prefix_lens=zero, prefix_lens_cpu=zero, seq_lens=length, seq_lens_cpu=length,
            last_loc=torch.tensor([-1]), extend_num_tokens=n,
        )  # fmt: skip

    def step(self, query, key, value):
        """One token more of every request: attention of every layer, `[layers, requests, ...]`; None without room."""
        from sglang.srt.model_executor.forward_batch_info import ForwardMode

        rows = torch.tensor(list(self.lengths))
        lengths = torch.tensor(list(self.lengths.values()))
        last = self.table[rows, lengths - 1].long()
        paged = (lengths + 1, lengths + 1, last)
        slots = self.allocator.alloc(len(rows)) if self.page_size == 1 else self.allocator.alloc_decode(*paged)
        if slots is None:
            return None
        self.table[rows, lengths] = slots.int()
        self.lengths = {row: n + 1 for row, n in self.lengths.items()}
        batch = SimpleNamespace(
            forward_mode=ForwardMode.DECODE, batch_size=len(rows), req_pool_indices=rows, seq_lens=lengths + 1,
            encoder_lens=None, out_cache_loc=slots,
        )  # fmt: skip
        self.backend.init_forward_metadata(batch)
        return torch.stack(
            [
                self.backend.forward_decode(query[i], key[i], value[i], layer_of(i), batch)
                for i in range(len(self.plan.kv))
            ]
        )

    def finish(self, row, grouped):
        """As SGLang frees a request: its whole row at once, in a group of frees or by itself."""
        if grouped:
            self.allocator.free_group_begin()
        self.allocator.free_segment(self.table[row, : self.lengths.pop(row)], start_pos=0)
        if grouped:
            self.allocator.free_group_end()


PLANS = [
    make_plan([KVSend(), sparse(2, 3), sparse(0, 7), sparse(2, 3)]),
    make_plan([sparse(4, 0), KVSend(), KVSend()]),
    make_plan([sparse(1, 2), sparse(3, 4)]),
]


@settings(max_examples=15, deadline=None)
@given(st.sampled_from(PLANS), st.sampled_from([1, 4]), st.randoms(use_true_random=False), st.integers(0, 99))
def test_a_split_pool_answers_as_one_pool_does(tmp_path_factory, plan, page_size, chance, seed):
    torch.manual_seed(seed)
    folder = tmp_path_factory.mktemp("plan")
    # wide enough to hold what one pool holds: what happens when it is not stands below
    one, split = Decoder(folder, plan, page_size), Decoder(folder, plan, page_size, SplitPool(isl=8, osl=8))
    layers = len(plan.kv)
    for _ in range(25):
        free = [row for row in range(ROWS) if row not in one.lengths]
        do = chance.choice(["admit", "step", "step", "finish"])
        if do == "admit" and free:
            row, n = chance.choice(free), chance.randint(1, 20)
            rows = torch.randn(2, layers, n, KV_HEADS, DIM)
            assert one.admit(row, *rows) == split.admit(row, *rows)
        elif do == "step" and one.lengths and max(one.lengths.values()) < CONTEXT:
            n = len(one.lengths)
            query, (key, value) = torch.randn(layers, n, HEADS * DIM), torch.randn(2, layers, n, KV_HEADS, DIM)
            expected, answer = one.step(query, key, value), split.step(query, key, value)
            if expected is None or answer is None:
                break
            assert expected.abs().max() < 100  # else something was read that nobody wrote
            assert torch.equal(answer, expected)
        elif do == "finish" and one.lengths:
            row, grouped = chance.choice(list(one.lengths)), chance.random() < 0.5
            one.finish(row, grouped)
            split.finish(row, grouped)
        held = sum(lengths - one.prompts[row] for row, lengths in split.lengths.items())
        for slots in split.allocator.kept:
            mine = held + sum(slots.rows(int(one.prompts[row])) for row in split.lengths)
            assert slots.size - slots.available == mine
            mapped = slots.map[slots.map > 0]
            assert len(mapped.unique()) == len(mapped) == mine
    for row in list(split.lengths):
        assert bool(split.allocator.verify_byte_accounting())
        split.finish(row, False)
    assert split.allocator.verify_byte_accounting() == []
    assert split.allocator.available_size() == TOKENS


@pytest.mark.parametrize("page_size", [1, 4])
def test_it_takes_the_memory_that_plan_prints(page_size):
    from pdtrim_deploy.sizing import Link, Traffic, price

    plan, isl, osl = PLANS[0], 40, 24
    pool = make_pool(plan, page_size, SplitPool(isl=isl, osl=osl)).get_kvcache()
    padding = (page_size + 3) * ROW_BYTES  # SGLang's page 0 of the full layer, slot 0 of each sparse one
    planned = price(plan, Traffic(isl, osl, Link(1e9))).planned
    assert sum(pool.get_kv_size_bytes()) - padding == TOKENS // (isl + osl) * planned.two_pool_bytes
    whole = make_pool(plan, page_size, None).get_kvcache()
    one_padding = page_size * len(plan.kv) * ROW_BYTES
    assert sum(whole.get_kv_size_bytes()) - one_padding == TOKENS // (isl + osl) * planned.decode_pool_bytes
    pointers, sizes, items = pool.get_contiguous_buf_infos()
    assert sum(sizes) == sum(pool.get_kv_size_bytes())
    assert set(items) == {ROW_BYTES // 2 * page_size}
    assert len(set(pointers)) == 8


@pytest.mark.parametrize("page_size", [1, 4])
def test_a_pool_that_is_short_gives_nothing_and_says_so_before(tmp_path, page_size):
    split = Decoder(tmp_path, PLANS[1], page_size, SplitPool(isl=40, osl=8))  # 128 * 12 / 48 = 32 slots for 4 + answer
    (slots,) = split.allocator.kept
    assert slots.size == 32
    rows = torch.zeros(2, 3, 20, KV_HEADS, DIM)
    assert all(split.admit(row, *rows) for row in range(3))
    room = [slots.available, split.allocator.available_size()]
    requests = [object()] * 3
    step = torch.zeros(3, 3, HEADS * DIM), *torch.zeros(2, 3, 3, KV_HEADS, DIM)
    new = 3 if page_size == 1 else 0
    for _ in range(6):
        assert split.allocator.check_decode_capacity(num_tokens=new, tree_cache=None, requests=requests)
        assert split.step(*step) is not None
    assert slots.available == 2 < room[0]
    assert split.allocator.available_size() > 3 * page_size  # it is not SGLang's pool that is full
    assert not split.allocator.check_decode_capacity(num_tokens=new, tree_cache=None, requests=requests)
    assert split.allocator.check_decode_capacity(num_tokens=new, tree_cache=None, requests=requests[:2])
    before = split.allocator.available_size()
    assert split.step(*step) is None
    assert not split.admit(3, *rows)
    assert (slots.available, split.allocator.available_size()) == (2, before)
    others = {"token_capacity": TOKENS, "sliding_window_size": None, "chunk_size": None}
    longest = [split.allocator.max_new_tokens_for_memory(prompt, 99, **others) for prompt in (3, 20, 120)]
    assert longest == [32 - 3 - 1, 32 - 4 - 1, TOKENS - 120 - page_size - 1]
    split.finish(1, False)
    assert split.admit(3, *rows)
    split.allocator.clear()
    assert split.allocator.verify_byte_accounting() == []


def queue_of(allocator, running=(), transfer=(), waiting=(), last=None, queue=()):
    scheduler = SimpleNamespace(
        running_batch=SimpleNamespace(reqs=list(running)), waiting_queue=list(waiting), last_batch=last
    )
    return SimpleNamespace(
        scheduler=scheduler, transfer_queue=SimpleNamespace(queue=[SimpleNamespace(req=r) for r in transfer]),
        num_reserved_decode_tokens=6, token_to_kv_pool_allocator=allocator,
        queue=[SimpleNamespace(req=r) for r in queue],
    )  # fmt: skip


def request(new, said=0):
    from sglang.srt.managers.schedule_batch import ReqKvInfo

    return SimpleNamespace(
        sampling_params=SimpleNamespace(max_new_tokens=new), output_ids=[0] * said, origin_input_ids=[0] * 20,
        kv=ReqKvInfo(),
    )  # fmt: skip


def test_a_request_waits_until_sparse_layers_have_room_for_it_and_for_the_others_growth():
    from pdtrim_sglang.patches import memory

    allocator = make_pool(PLANS[1], 1, SplitPool(isl=40, osl=8))  # 32 slots, 4 a prompt
    prebuilt = SimpleNamespace(reqs=[request(5)], forward_mode=SimpleNamespace(is_prebuilt=lambda: True))

    def asks(req, **others):
        return memory.ask_sparse_layers(lambda *_: 26, queue_of(allocator, **others), req, 20, 0, 0)

    assert asks(request(6)) == 26
    # 4 + 6 for it; 6, 3, 6 and 5 for the others: 30
    others = {"running": [request(9, 3)], "transfer": [request(3)], "waiting": [request(99)], "last": prebuilt}
    assert asks(request(6), **others) == 26
    others["waiting"].append(request(2))
    assert asks(request(6), **others) == 26
    others["waiting"].append(request(1))
    assert asks(request(6), **others) > TOKENS
    assert asks(request(5), **others) == 26
    stock = make_pool(PLANS[1], 1, None)
    assert memory.ask_sparse_layers(lambda *_: 26, queue_of(stock, **others), request(999), 20, 0, 0) == 26
    # SGLang's 512 tokens beside a prompt are more than a small pool has: it would wait for ever
    assert memory.ask_sparse_layers(lambda *_: 20 + 512, queue_of(stock), request(9), 20, 0, 0) == stock.size


def test_a_burst_is_admitted_as_far_as_its_answers_fit():
    """As `pop_preallocated` goes through its queue: who was given slots stays in it until the pass has ended."""
    from pdtrim_sglang.patches import memory

    allocator = make_pool(PLANS[1], 1, SplitPool(isl=40, osl=8))  # 32 slots, 4 a prompt and 6 an answer
    queue = queue_of(allocator, queue=[request(6) for _ in range(6)])

    def alloc(queue, req):
        req.kv.req_pool_idx = 0
        return queue.token_to_kv_pool_allocator.alloc(20)

    queue.req_to_token_pool, admitted = SimpleNamespace(), 0
    for waiting in queue.queue:
        if memory.ask_sparse_layers(lambda *_: 26, queue, waiting.req, 20, 0, 0) > TOKENS:
            break
        assert memory.note_prompt_length(alloc, queue, waiting.req) is not None
        admitted += 1
    assert admitted == 3


def configurator(tmp_path, plan, told, **args):
    (tmp_path / "config.json").write_text(json.dumps({"pdtrim": plan.model_dump(mode="json")}))
    good = {"disaggregation_mode": "decode", "disaggregation_decode_retraction_backup": "none"}
    return SimpleNamespace(
        server_args=SimpleNamespace(
            model_path=str(tmp_path),
            json_model_override_args=json.dumps({"pdtrim_decode_pool": told} if told else {}),
            **good | args,
        ),
    )


def test_sglang_is_told_what_a_token_costs_and_which_pool_to_make(tmp_path):
    from pdtrim_sglang.patches import memory
    from pdtrim_sglang.split_pool.pool import SplitKVPool
    from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

    made = configurator(tmp_path, PLANS[1], {"isl": 40, "osl": 8})
    single = 3 * ROW_BYTES
    cell = memory.split_cell_size(lambda *_: single, None, made, 3)
    assert cell == ROW_BYTES * 2 + ROW_BYTES * 12 // 48
    given = memory.split_pool(lambda _, **given: given, made, mha_pool_class=MHATokenToKVPool, max_total_num_tokens=5)
    assert given["mha_pool_class"].func is SplitKVPool
    assert given["max_total_num_tokens"] == 5
    plain = configurator(tmp_path, PLANS[1], None)
    assert memory.split_cell_size(lambda *_: single, None, plain, 3) == single
    given = memory.split_pool(lambda _, **given: given, plain, mha_pool_class=MHATokenToKVPool)
    assert given == {"mha_pool_class": MHATokenToKVPool}


@pytest.mark.parametrize(
    ("plan", "told", "args", "sentence"),
    [
        (
            PLANS[0],
            {"isl": 4},
            {},
            r"pdtrim_decode_pool\.osl in --json-model-ov\S+: Field required; valid: isl",
        ),
        (PLANS[0], {"isl": 4, "osl": 4}, {"disaggregation_mode": "prefill"}, "start prefill without it"),
        (make_plan([KVSend()]), {"isl": 4, "osl": 4}, {}, "this plan has none: start without it"),
        (PLANS[0], {"isl": 4, "osl": 4}, {"disaggregation_decode_retraction_backup": None}, "backup none"),
    ],
)
def test_what_cannot_be_done_is_refused(tmp_path, plan, told, args, sentence):
    from pdtrim_sglang.split_pool.build import wanted

    with pytest.raises(RuntimeError, match=sentence):
        wanted(configurator(tmp_path, plan, told, **args))


def test_a_pool_too_small_for_one_request_is_refused():
    with pytest.raises(RuntimeError, match=r"128 tokens leave 13 to layers that keep 4 \+ 0 .*--max-total"):
        make_pool(PLANS[1], 1, SplitPool(isl=190, osl=16))
