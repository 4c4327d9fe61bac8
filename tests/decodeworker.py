"""A decode worker's memory and attention, of SGLang's own parts and ours, and attention written down plainly.

Genuine: pools of requests and tokens, allocators with our hooks on them, the transfer of packed rows, attention
backends. Stood in for: the scheduler, which calls them in SGLang's order, and the model.
"""

import contextlib
import copy
import itertools
import json
from types import SimpleNamespace

import torch

from pdtrim_deploy.kvcache.layout import chunk_layout
from pdtrim_deploy.kvcache.pack import pack
from pdtrim_deploy.plan import KVSend, ModelShape, PDPlan

HEADS, KV_HEADS, DIM, CONTEXT, TOKENS, REQUESTS = 4, 2, 16, 64, 256, 6
GARBAGE = 1e3  # what nobody may read


def make_plan(sends, kv_heads=KV_HEADS, head_dim=DIM, pool_dtype="native"):
    """A plan that drops nothing and sends `sends`."""
    shape = ModelShape(
        architecture="X", fingerprint="f", num_blocks=len(sends), num_kv_heads=kv_heads, head_dim=head_dim,
        kv_dtype="float32", pool_dtype=pool_dtype,
    )  # fmt: skip
    return PDPlan.dense(shape).with_kv(tuple(sends))


def sparse(n_first, n_last):
    return KVSend(mode="sparse", n_first=n_first, n_last=n_last)


@contextlib.contextmanager
def sglang():
    """SGLang in this process: our hooks on it, and a server's settings, which its attention backends read."""
    from sglang.srt.plugins import load_plugins
    from sglang.srt.runtime_context import get_context, get_parallel

    load_plugins()
    ranks = {"attn_tp_size": 1, "attn_tp_rank": 0, "attn_dcp_size": 1, "attn_dcp_rank": 0}
    with (
        get_context().override_server_args(device="cpu", triton_attention_num_kv_splits=2),
        get_parallel().override(**ranks),
    ):
        yield


def layer_of(index):
    """What SGLang's RadixAttention tells a backend."""
    from sglang.srt.layers.radix_attention import AttentionType

    return SimpleNamespace(
        layer_id=index, tp_q_head_num=HEADS, tp_k_head_num=KV_HEADS, tp_v_head_num=KV_HEADS, qk_head_dim=DIM,
        v_head_dim=DIM, head_dim=DIM, scaling=DIM**-0.5, is_cross_attention=False, sliding_window_size=-1,
        logit_cap=0.0, logit_capping_method="tanh", k_scale=None, v_scale=None, k_scale_float=None,
        v_scale_float=None, xai_temperature_len=-1, attn_type=AttentionType.DECODER,
    )  # fmt: skip


def configurator(folder, plan, sizes=None, **args):
    """What SGLang's KVCacheConfigurator tells our hooks of a decode worker."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"pdtrim": plan.model_dump(mode="json")}))
    override = {"pdtrim_decode_pool": sizes} if sizes else {}
    settings = {
        "model_path": str(folder), "json_model_override_args": json.dumps(override), "max_total_tokens": TOKENS,
        "disaggregation_mode": "decode", "disaggregation_decode_retraction_backup": "cpu_tensor",
        "speculative_algorithm": None,
    }  # fmt: skip
    return SimpleNamespace(server_args=SimpleNamespace(**settings | args))


def make_memory(folder, plan, page_size=1, sizes=None, tokens=TOKENS, **args):
    """SGLang's pool of requests and its allocator of tokens, made through our hooks."""
    from pdtrim_sglang.patches import memory
    from sglang.srt.disaggregation.decode import DecodeReqToTokenPool
    from sglang.srt.mem_cache.allocator.paged import PagedTokenToKVPoolAllocator
    from sglang.srt.mem_cache.allocator.token import TokenToKVPoolAllocator
    from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

    configured, shape = configurator(folder, plan, sizes, **args), {
        "page_size": page_size, "dtype": getattr(torch, plan.model.row_dtype), "head_num": KV_HEADS, "head_dim": DIM,
        "layer_num": len(plan.kv), "device": "cpu", "enable_memory_saver": False,
    }  # fmt: skip
    pool = memory.kept_pool(
        lambda _, mha_pool_class: mha_pool_class(tokens, **shape), configured, mha_pool_class=MHATokenToKVPool
    )
    requests = DecodeReqToTokenPool(REQUESTS, CONTEXT, "cpu", False, 0)
    pool_options = {"dtype": torch.float32, "device": "cpu", "kvcache": pool, "need_sort": True}
    pool_sizes = (tokens,) if page_size == 1 else (tokens, page_size)
    allocator = (TokenToKVPoolAllocator if page_size == 1 else PagedTokenToKVPoolAllocator)(*pool_sizes, **pool_options)
    memory.bind_tables(allocator, configured, req_to_token_pool=requests)
    return requests, allocator


class Request:
    """What SGLang's Req tells its pools, and the rows that a model has made for it: `[layers, tokens, heads, dim]`."""

    def __init__(self, keys, values, new_tokens=8):
        from sglang.srt.managers.schedule_batch import ReqKvInfo

        self.keys, self.values, self.prompt = keys, values, keys.shape[1]
        self.origin_input_ids, self.output_ids, self.rid = [0] * self.prompt, [], "r"
        self.sampling_params, self.kv = SimpleNamespace(max_new_tokens=new_tokens), ReqKvInfo()
        self.pd_rebootstrap_in_progress, self.host_copy = False, None

    @property
    def length(self):
        return self.keys.shape[1]

    def append(self, key, value):
        self.keys, self.values = (
            torch.cat((rows, new[:, None]), 1) for rows, new in ((self.keys, key), (self.values, value))
        )
        self.output_ids.append(0)


class DecodeWorker:
    """`backend` is a name of `--attention-backend`, whose SGLang factory is taken from its registry.

    Attributes:
        running: requests under way, in the order of the batch.

    """

    def __init__(self, folder, plan, page_size=1, sizes=None, backend="torch_native", tokens=TOKENS, make=None):
        from pdtrim_sglang.attention.factory import KeptFactory
        from pdtrim_sglang.pool import PoolView
        from sglang.srt.configs.model_config import AttentionArch
        from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS
        from sglang.srt.mem_cache.kv_index_translator import KVIndexTranslator
        from transformers import LlamaConfig

        self.plan, self.page_size = plan, page_size
        self.requests, self.allocator = make_memory(folder, plan, page_size, sizes, tokens)
        self.pool = self.allocator.get_kvcache()
        for buffer in (*self.pool.k_buffer, *self.pool.v_buffer):
            buffer.view(self.pool.dtype).fill_(min(GARBAGE, torch.finfo(self.pool.dtype).max))
        self.view, self.running = PoolView.of(self.pool), []
        self.translator = KVIndexTranslator(
            req_to_token=self.requests.req_to_token, token_to_kv_pool_allocator=self.allocator,
            token_to_kv_pool=self.pool, page_size=page_size, device="cpu",
        )  # fmt: skip
        config = LlamaConfig(num_attention_heads=HEADS, architectures=["LlamaForCausalLM"])
        model = SimpleNamespace(
            attention_arch=AttentionArch.MHA, context_len=CONTEXT, head_dim=DIM, v_head_dim=DIM, swa_v_head_dim=DIM,
            num_attention_heads=HEADS, get_max_num_attention_heads=lambda: HEADS, hidden_size=HEADS * DIM,
            get_num_kv_heads=lambda *_: KV_HEADS, hf_config=config, hf_text_config=config, is_encoder_decoder=False,
            linear_attn_registry_result=None, is_multimodal=False, is_local_attention_model=False,
        )  # fmt: skip
        self.runner = SimpleNamespace(
            device="cpu", gpu_id=0, page_size=page_size, dtype=torch.float32, kv_cache_dtype=self.pool.dtype,
            kv_cache_dtype_str="auto", model_config=model, req_to_token_pool=self.requests, token_to_kv_pool=self.pool,
            token_to_kv_pool_allocator=self.allocator, kv_index_translator=self.translator, is_draft_worker=False,
            sliding_window_size=None, attention_chunk_size=None, decode_num_tokens_per_req=lambda: 1,
            init_new_workspace=False, use_mla_backend=False, prefill_attention_backend_str=backend,
            decode_attention_backend_str=backend, is_hybrid_swa=False, max_running_requests=REQUESTS,
            model=torch.nn.Identity(),
            server_args=SimpleNamespace(disaggregation_mode="decode", dllm_algorithm=None),
        )  # fmt: skip
        factory = ATTENTION_BACKENDS[backend] if make is None else KeptFactory(backend, make)
        self.backend = factory(self.runner)

    def queue(self, *requests):
        """SGLang's DecodePreallocQueue, as far as our hooks ask it, with `requests` waiting."""
        from sglang.srt.disaggregation.decode import DecodePreallocQueue

        scheduler = SimpleNamespace(running_batch=SimpleNamespace(reqs=self.running), waiting_queue=[], last_batch=None)
        return SimpleNamespace(
            scheduler=scheduler, transfer_queue=SimpleNamespace(queue=[]), num_reserved_decode_tokens=6,
            token_to_kv_pool_allocator=self.allocator, queue=[SimpleNamespace(req=req) for req in requests],
            req_to_token_pool=self.requests, _pre_alloc_fill_len=DecodePreallocQueue._pre_alloc_fill_len,
        )  # fmt: skip

    def allocate(self, req):
        """What `_pre_alloc` does, with our hook around it; False where admission says no."""
        from pdtrim_sglang.patches import memory
        from sglang.srt.disaggregation.decode import DecodePreallocQueue, alloc_for_decode_prealloc

        queue, tokens = self.queue(req), DecodePreallocQueue._pre_alloc_fill_len(req)
        needed = -(-tokens // self.page_size) * self.page_size
        if memory.ask_cut_layers(lambda *_: needed + 6, queue, req, needed, 0) > self.allocator.available_size():
            return False

        def pre_alloc(queue, req):
            (row,) = self.requests.alloc([req])
            req.kv.kv_committed_len = tokens
            options = {"prefix_len": 0, "total_prefix_len": 0, "prefix_indices": None, "swa_tail_len": 0}
            slots = alloc_for_decode_prealloc(
                self.allocator, req=req, fill_len=tokens, delta_len=tokens, uses_swa_tail=False, **options
            )
            self.requests.write((row, slice(0, tokens)), slots.int())
            return slots

        memory.admit(pre_alloc, queue, req)
        return True

    def admit(self, req, chunks=2):
        """Slots for a request, and its prompt's rows through the transfer; False when there is no room."""
        from pdtrim_sglang.protocol import ChunkHeader
        from pdtrim_sglang.rooms import DecodeRoom

        if not self.allocate(req):
            return False
        n, row = req.prompt, req.kv.req_pool_idx
        req.keys, req.values = (rows.to(self.pool.dtype).float() for rows in (req.keys, req.values))
        slots = self.requests.req_to_token[row, :n].long()
        room = DecodeRoom(1, n, 0, self.view.destinations(slots, row), 0, senders={0: self.view.heads})
        cuts = sorted({0, *(n * i // chunks for i in range(1, chunks)), n})
        for start, stop in itertools.pairwise(cuts):
            at = torch.arange(start, stop)
            rows = [list(side.to(self.pool.dtype)) for side in (req.keys, req.values)]  # as prefill's pool has them
            packed = pack(chunk_layout(self.plan, n, start, stop), *rows, at)
            header = ChunkHeader(
                digest=bytes(32), room=1, rank=0, prompt_tokens=n, start=start, stop=stop, aux_bytes=0,
                payload_bytes=len(packed), last=stop == n, heads=self.view.heads,
            )  # fmt: skip
            aux = SimpleNamespace(total_bytes=0, write=lambda index, data: None)
            assert room.take(self.plan, self.view, aux, header, packed, memoryview(b"")) == ""
        self.running.append(req)
        return True

    def prepare(self):
        """Slots of one token more for every request: what `ScheduleBatch.prepare_for_decode` does."""
        from sglang.srt.mem_cache.allocation import alloc_for_decode

        reqs = self.running
        rows, lengths = torch.tensor([req.kv.req_pool_idx for req in reqs]), torch.tensor([r.length for r in reqs])
        batch = SimpleNamespace(
            device="cpu", reqs=reqs, seq_lens=lengths, seq_lens_cpu=lengths.clone(), req_pool_indices=rows,
            req_pool_indices_cpu=rows.clone(), req_to_token_pool=self.requests, maybe_evict_swa=lambda: None,
            tree_cache=Tree(self.allocator), model_config=SimpleNamespace(is_encoder_decoder=False),
        )  # fmt: skip
        slots = alloc_for_decode(batch, 1)
        return self.forward_batch(rows, lengths + 1, slots)

    def forward_batch(self, rows, lengths, slots, on_host=True):
        from sglang.srt.model_executor.forward_batch_info import ForwardMode

        batch = SimpleNamespace(
            forward_mode=ForwardMode.DECODE, batch_size=len(rows), req_pool_indices=rows, seq_lens=lengths,
            seq_lens_cpu=lengths.clone() if on_host else None, seq_lens_sum=int(lengths.sum()) if on_host else None,
            positions=lengths - 1, encoder_lens=None, out_cache_loc=slots, spec_info=None, max_seq_len_override=None,
        )  # fmt: skip
        self.translator.bind_own_plan(batch)
        return batch

    def attend(self, batch, q, k, v):
        """Every layer's attention: q `[layers, requests, heads * dim]`; k, v `[layers, requests, kv_heads, dim]`."""
        return torch.stack(
            [self.backend.forward(q[i], k[i], v[i], layer_of(i), batch) for i in range(len(self.plan.kv))]
        )

    def step(self, on_host=True):
        """One token more of every request without a CUDA graph; what attention gave, and what it should."""
        batch = self.prepare()
        if not on_host:
            batch.seq_lens_cpu = batch.seq_lens_sum = None
        q, k, v = self.new_rows(len(self.running))
        self.backend.init_forward_metadata(batch)
        return self.attend(batch, q, k, v), self.expected(q, k, v)

    def new_rows(self, requests):
        layers = len(self.plan.kv)
        k, v = torch.randn(2, layers, requests, KV_HEADS, DIM)
        return torch.randn(layers, requests, HEADS * DIM), k, v

    def expected(self, q, k, v):
        """The rule itself, one request, layer and head at a time; the new rows become the requests'."""
        out = torch.empty(len(self.plan.kv), len(self.running), HEADS, DIM)
        for i, req in enumerate(self.running):
            req.append(*(new[:, i].to(self.pool.dtype).float() for new in (k, v)))
            for layer, send in enumerate(self.plan.kv):
                kept = [p for lo, hi in send.row_ranges(req.prompt) for p in range(lo, hi)]
                kept += range(req.prompt, req.length)
                keys, values = req.keys[layer][kept], req.values[layer][kept]
                for head, query in enumerate(q[layer, i].view(HEADS, DIM)):
                    group = head * KV_HEADS // HEADS
                    weights = torch.softmax(keys[:, group] @ query * DIM**-0.5, 0)
                    out[layer, i, head] = weights @ values[:, group]
        return out.flatten(2)

    def finish(self, req, retract=False, in_flight=False):
        """The request ends; or it is retracted, and keeps its rows on the host.

        `in_flight`: the forward pass of its newest token is under way (SGLang's overlap scheduling). Nobody reads its
        result, and SGLang saves the tokens before it.
        """
        row = req.kv.req_pool_idx
        slots = self.requests.req_to_token[row, : req.length].long()
        if in_flight:
            req.keys, req.values = req.keys[:, :-1], req.values[:, :-1]
            req.output_ids.pop()
        if retract:
            req.host_copy = self.allocator.get_cpu_copy(slots[: req.length], req_pool_index=row)
        self.allocator.free(slots)
        self.requests.free(req)
        self.running.remove(req)

    def resume(self, req):
        """A retracted request comes back; False when there is no room. Its newest token has no slot yet."""
        req.output_ids.append(0)  # sampled before it was retracted: SGLang counts it, its rows are not made yet
        room = self.allocate(req)
        req.output_ids.pop()
        if room:
            slots = self.requests.req_to_token[req.kv.req_pool_idx, : req.length].long()
            self.allocator.load_cpu_copy(req.host_copy, slots, req_pool_index=req.kv.req_pool_idx)
            self.running.append(req)
        return room


class Tree:
    """SGLang's prefix cache of a decode worker: there is none."""

    def __init__(self, allocator):
        self.token_to_kv_pool_allocator, self.page_size = allocator, allocator.page_size

    def supports_prefix_sharing(self):
        return False


class Graph:
    """A captured CUDA graph of a decode worker for `size` requests, as SGLang's runner captures and replays it.

    What its kernels were given at capture they read again at replay, wherever Python points by then.
    """

    def __init__(self, worker, size):
        self.worker, self.size, backend = worker, size, worker.backend
        fill = backend.get_cuda_graph_seq_len_fill_value()
        self.rows, self.slots = torch.zeros(2, size, dtype=torch.int64)
        self.lengths = torch.full((size,), fill, dtype=torch.int64)
        backend.init_cuda_graph_state(size, size)
        self.fill, self.batch = fill, worker.forward_batch(self.rows, self.lengths, self.slots)
        backend.init_forward_metadata_out_graph(self.batch, in_capture=True)
        backend.init_forward_metadata_in_graph(self.batch)
        self.captured = self._python_state()

    def _python_state(self):
        group_states = [vars(group).copy() for group in self.worker.backend._groups]
        return [each.forward_metadata for each in self.worker.backend.attn_backend_list], group_states

    def replay(self, batch):
        """Attention of all layers for a batch of up to `size` requests; expected as `DecodeWorker.step`."""
        worker, n, backend = self.worker, batch.batch_size, self.worker.backend
        self.rows[:n], self.lengths[:n], self.slots[:n] = batch.req_pool_indices, batch.seq_lens, batch.out_cache_loc
        self.rows[n:], self.lengths[n:], self.slots[n:] = 0, self.fill, 0
        view = copy.copy(batch)
        view.batch_size, view.req_pool_indices, view.seq_lens = self.size, self.rows, self.lengths
        view.seq_lens_cpu = self.lengths.clone()
        view.seq_lens_sum = batch.seq_lens_sum + (self.size - n) * self.fill
        backend.init_forward_metadata_out_graph(view)
        before, (metadata, group_states) = self._python_state(), self.captured
        self._set(metadata, group_states)
        backend.init_forward_metadata_in_graph(self.batch)
        q, k, v = worker.new_rows(self.size)
        answer = worker.attend(self.batch, q, k, v)[:, :n]
        self._set(*before)
        return answer, worker.expected(q[:, :n], k[:, :n], v[:, :n])

    def _set(self, metadata, group_states):
        for each, kept in zip(self.worker.backend.attn_backend_list, metadata, strict=True):
            each.forward_metadata = kept
        for group, kept in zip(self.worker.backend._groups, group_states, strict=True):
            vars(group).update(kept)


def history(worker, chance, steps, compare, graph=None):
    """Random requests come, grow, end, are retracted and come back, for `steps` steps of the batch.

    `compare` takes each step's attention and the rule's. Returns the number of steps.
    """
    retracted, done = [], 0
    for _ in range(10 * steps):
        if done == steps:
            break
        act = chance.choice(["admit", "admit", "step", "step", "step", "finish", "retract", "resume"])
        fits = len(worker.running) < REQUESTS - 1
        if act == "admit" and fits:
            n = chance.randint(1, 30)
            keys, values = torch.randn(2, len(worker.plan.kv), n, KV_HEADS, DIM)
            worker.admit(Request(keys, values), chunks=chance.randint(1, 3))
        elif act == "step" and worker.running and max(req.length for req in worker.running) < CONTEXT:
            if worker.allocator.check_decode_capacity(
                num_tokens=new_tokens(worker), tree_cache=Tree(worker.allocator), requests=worker.running
            ):
                n, done = len(worker.running), done + 1
                if graph is not None and n <= graph.size and chance.random() < 0.7:
                    compare(*graph.replay(worker.prepare()))
                else:
                    compare(*worker.step(on_host=worker.backend.needs_cpu_seq_lens or chance.random() < 0.5))
        elif act == "finish" and worker.running:
            worker.finish(chance.choice(worker.running))
        elif act == "retract" and worker.running:
            retracted.append(chance.choice(worker.running))
            in_flight = bool(retracted[-1].output_ids) and chance.random() < 0.5
            worker.finish(retracted[-1], retract=True, in_flight=in_flight)
        elif act == "resume" and retracted and fits and worker.resume(retracted[0]):
            retracted.pop(0)
        check_slots(worker)
    for req in list(worker.running):
        assert not hasattr(worker.pool, "kept") or worker.allocator.verify_byte_accounting()
        worker.finish(req)
    assert worker.allocator.verify_byte_accounting() == []
    assert worker.allocator.available_size() == worker.allocator.size
    return done


def new_tokens(worker):
    """What SGLang asks its allocator for the next step."""
    return sum(worker.page_size if req.length % worker.page_size == 0 else 0 for req in worker.running)


def check_slots(worker):
    """No two live requests share a page in any group, none holds page 0, and what nobody holds is free."""
    kept = getattr(worker.pool, "kept", None)
    for group in kept.groups if kept else ():
        pages = []
        for req in worker.running:
            n = group.rule.rows(req.prompt) + req.length - req.prompt
            slots = group.table[req.kv.req_pool_idx, :n].long()
            assert len(slots.unique()) == n
            assert torch.equal(slots % worker.page_size, torch.arange(n) % worker.page_size)
            pages += (slots[:: worker.page_size] // worker.page_size).tolist()
        free = group._free.tolist()
        assert sorted(pages + free) == list(range(1, group.pages + 1))
