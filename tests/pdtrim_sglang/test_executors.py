"""Executors: chosen by name, refused with a sentence; TensorRT's against a stand-in for its narrow interface."""

import ctypes
import json
from types import SimpleNamespace

import pytest
import torch
from pdtrim_sglang.executors import load_engine
from pdtrim_sglang.executors.tensorrt import LIBRARY, TensorRTExecutor, check_engine
from pdtrim_tensorrt.plugin_library import AttentionCall

from pdtrim_deploy.bundle.engine import TargetResult
from pdtrim_deploy.plan import ModelShape, PDPlan
from pdtrim_deploy.worker.config import EngineConfig, WorkerConfig

HEADS, KV_HEADS, DIM, HIDDEN, MOST, STREAM = 2, 1, 4, 8, 16, 99
PLAN = PDPlan.dense(
    ModelShape(architecture="X", fingerprint="f", num_blocks=1, num_kv_heads=KV_HEADS, head_dim=DIM, kv_dtype="float32")
)


def host_view(pointer, shape, dtype):
    size = torch.Size(shape).numel() * dtype.itemsize
    if not size:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer((ctypes.c_ubyte * size).from_address(pointer), dtype=dtype).view(shape)


class DeviceMemory:
    """Tensors as a GPU's allocator gives them: each at a multiple of 512 bytes. `of` refuses other memory."""

    ALIGNMENT = 512

    def __init__(self):
        self.tensors = []

    def allocate(self, tensor):
        size = tensor.numel() * tensor.element_size()
        whole = torch.zeros(size + self.ALIGNMENT, dtype=torch.uint8)
        start = -whole.data_ptr() % self.ALIGNMENT
        self.tensors.append(whole[start : start + size])
        return self.tensors[-1].view(tensor.dtype).view(tensor.shape).copy_(tensor)

    def check(self, name, pointer, size=1):
        """TensorRT's own condition on addresses (setTensorAddress), and that the bytes are somebody's."""
        assert pointer % 256 == 0, f"{name} at {pointer:#x}, TensorRT asks for a multiple of 256 bytes"
        held = ((held.data_ptr(), held.data_ptr() + len(held)) for held in self.tensors)
        assert any(lo <= pointer and pointer + size <= hi for lo, hi in held), f"{name} lies in no memory of the GPU"


MEMORY = DeviceMemory()


@pytest.fixture(autouse=True)
def device_memory(monkeypatch):
    """What the executor allocates is on the GPU."""
    monkeypatch.setattr(MEMORY, "tensors", [])
    for name in ("empty", "zeros"):
        genuine = getattr(torch, name)

        def allocate(*size, genuine=genuine, device=None, **options):
            tensor = genuine(*size, **options)
            return tensor if device is None else MEMORY.allocate(tensor)

        monkeypatch.setattr(torch, name, allocate)


def on_gpu(tensor):
    return MEMORY.allocate(tensor)


class Library:
    error = None

    def set_attention(self, attend):
        self.attend = attend


class Session:
    """A context whose engine is: q = ids and positions; attention; hidden = attended; rows of k and v packed.

    `contexts`: all of the engine, in the order they were made. One that was enqueued while `capturing` holds has its
    shape `captured`, and refuses another.
    """

    def __init__(self, library, wire=torch.float32, contexts=None):
        self.library, self.shapes, self.at, self.history, self.stream = library, {}, {}, {}, STREAM
        self.wire, self.contexts = wire, [] if contexts is None else contexts
        self.contexts.append(self)
        self.capturing, self.captured = False, None
        self.inputs = {"input_ids": MOST, "positions": MOST, "send_rows_full": MOST}
        self.outputs = {
            "hidden_states": ((-1, HIDDEN), torch.float32),
            "kv_send_0": ((2, -1, KV_HEADS * DIM), wire),
        }

    def another(self):
        return Session(self.library, self.wire, self.contexts)

    def set_shape(self, name, shape):
        assert self.captured is None or self.captured[name] == shape, "a captured graph replays this context's shape"
        self.shapes[name] = shape

    def set_address(self, name, pointer):
        MEMORY.check(name, pointer)
        self.at[name] = pointer
        self.history.setdefault(name, []).append(pointer)

    def bytes_of(self):
        """Bytes that this run reads or writes of each input and output."""
        (tokens,), (rows,) = self.shapes["input_ids"], self.shapes["send_rows_full"]
        sizes = {name: 8 * self.shapes[name][0] for name in self.inputs}
        return sizes | {"hidden_states": 4 * tokens * HIDDEN, "kv_send_0": 4 * 2 * rows * KV_HEADS * DIM}

    def enqueue(self, stream):
        (tokens,) = self.shapes["input_ids"]
        if self.contexts[0].capturing:
            self.captured = dict(self.shapes)
        for name, size in self.bytes_of().items():
            MEMORY.check(name, self.at[name], size)
        ids, positions, rows = (host_view(self.at[n], self.shapes[n], torch.int64) for n in self.inputs)
        q = torch.stack([ids] * 4 + [positions] * 4, dim=1).float().contiguous()
        k, v = q[:, :DIM].contiguous(), q[:, DIM:].contiguous()
        out = torch.empty_like(q)
        call = AttentionCall(
            *(x.data_ptr() for x in (q, k, v, out)),
            self.stream,
            tokens,
            0,
            HIDDEN,
            HEADS,
            KV_HEADS,
            DIM,
            "float32",
            0.5,
        )
        try:
            self.library.attend(call)
        except BaseException as error:
            self.library.error = error
            return False
        host_view(self.at["hidden_states"], (tokens, HIDDEN), torch.float32).copy_(out + 1)
        packed = host_view(self.at["kv_send_0"], (2, len(rows), KV_HEADS * DIM), torch.float32)
        packed.copy_(torch.stack((k[rows], v[rows])))
        return True


def make(attention=lambda layer, q, k, v: q * 2, **options):
    library = Library()
    session = Session(library, **options)
    device = torch.device("cpu")
    executor = TensorRTExecutor(
        session, library, attention, device, host_view, lambda: STREAM, lambda: session.capturing
    )
    return executor, session


def expected(ids, positions):
    return torch.stack([ids] * 4 + [positions] * 4, dim=1).float() * 2 + 1


def test_tensorrt_runs_on_torch_tensors_and_sends_into_the_given_buffer():
    executor, _ = make()
    ids, positions = torch.tensor([5, 6, 7]), torch.tensor([10, 11, 12])
    rows, packed = torch.tensor([0, 2]), on_gpu(torch.full((2, 2, KV_HEADS, DIM), -1.0))
    hidden = executor.run(ids, positions, {"send_rows_full": rows}, {"kv_send_0": packed})
    assert torch.equal(hidden, expected(ids, positions))
    assert packed[:, :, 0, 0].tolist() == [[5, 7], [10, 12]]
    assert executor.packs


def test_tensorrt_keeps_its_addresses_and_allocates_nothing(monkeypatch):
    """What a captured CUDA graph would find: other tokens and sizes, the same memory."""
    executor, session = make()
    ids = torch.arange(9)
    hidden = executor.run(ids, ids).data_ptr()
    before = {name: list(pointers) for name, pointers in session.history.items()}
    for count in (1, 4, 9, 1):
        hidden_states = executor.run(ids[:count] + count, ids[:count])
        assert hidden_states.data_ptr() == hidden
        assert torch.equal(hidden_states, expected(ids[:count] + count, ids[:count]))
    assert session.history == before
    assert all(len(pointers) == 1 for pointers in before.values())
    for name in ("empty", "zeros", "empty_like", "tensor", "full"):
        monkeypatch.setattr(torch, name, None)  # the stand-in itself needs empty_like: run the executor's part only
    monkeypatch.setattr(session, "enqueue", lambda stream: True)
    executor.run(ids, ids)


def test_each_captured_shape_has_a_context_of_its_own():
    """SGLang captures decode's batch sizes in turn, each after two runs, and then runs any batch between replays."""
    executor, session = make()
    ids = torch.arange(MOST)
    for count in (8, 4, 1):
        for capturing in (False, False, True):
            session.capturing = capturing
            executor.run(ids[:count], ids[:count])
    session.capturing = False
    assert [context.captured["input_ids"] for context in session.contexts] == [(8,), (4,), (1,)]
    for count in (3, 8, 5, 16, 4, 2, 1):
        values = ids[:count] + count
        assert torch.equal(executor.run(values, ids[:count]), expected(values, ids[:count]))
    assert len(session.contexts) == 4  # the sizes that no graph has share one


def test_tensorrt_binds_the_arena_for_one_call_only():
    executor, session = make()
    ids, packed = torch.arange(3), on_gpu(torch.zeros(2, 3, KV_HEADS, DIM))
    executor.run(ids, ids)
    idle = session.at["kv_send_0"]
    executor.run(ids, ids, {"send_rows_full": ids}, {"kv_send_0": packed})
    assert session.at["kv_send_0"] == packed.data_ptr()
    executor.run(ids, ids)
    assert session.at["kv_send_0"] == idle
    assert session.shapes["send_rows_full"] == (0,)


@pytest.mark.parametrize(
    ("place", "sentence"),
    [
        (lambda: on_gpu(torch.zeros(9, 3, KV_HEADS, DIM))[1:3], "a multiple of 256 bytes"),
        (lambda: torch.zeros(1 << 12).untyped_storage(), "lies in no memory of the GPU"),
        (lambda: on_gpu(torch.zeros(1, 3, KV_HEADS, DIM)), "lies in no memory of the GPU"),
    ],
)
def test_the_stand_in_refuses_what_tensorrt_would(place, sentence):
    """Rows inside a tensor, memory of the host, and a buffer that is too small."""
    executor, _ = make()
    packed, ids = place(), torch.arange(3)
    if isinstance(packed, torch.UntypedStorage):
        start = -packed.data_ptr() % 256 // 4
        packed = torch.empty(0).set_(packed)[start : start + 24].view(2, 3, KV_HEADS, DIM)
    with pytest.raises(AssertionError, match=sentence):
        executor.run(ids, ids, {"send_rows_full": ids}, {"kv_send_0": packed})


def test_what_attention_raises_comes_out_of_run_and_the_next_run_is_clean():
    fail = [True]

    def attend(layer, q, k, v):
        if fail[0]:
            raise KeyError("no such pool")
        return q * 2

    executor, _ = make(attend)
    ids = torch.arange(2)
    with pytest.raises(KeyError, match="no such pool"):
        executor.run(ids, ids)
    fail[0] = False
    assert torch.equal(executor.run(ids, ids), expected(ids, ids))


def test_another_stream_is_refused():
    executor, session = make()
    session.stream = 1
    with pytest.raises(RuntimeError, match="another stream"):
        executor.run(torch.arange(2), torch.arange(2))


def test_a_refused_enqueue_and_too_many_tokens_say_so(monkeypatch):
    executor, session = make()
    with pytest.raises(RuntimeError, match="17 tokens, the engine takes 16: start with --chunked-prefill-size 16"):
        executor.run(torch.arange(17), torch.arange(17))
    monkeypatch.setattr(session, "enqueue", lambda stream: False)
    with pytest.raises(RuntimeError, match="could not enqueue"):
        executor.run(torch.arange(2), torch.arange(2))


def test_an_engine_that_encodes_rows_leaves_packing_to_the_sender():
    assert not make(wire=torch.int8)[0].packs


@pytest.mark.parametrize(
    ("change", "library", "sentence"),
    [
        ({}, True, None),
        ({"stage": "decode"}, True, "is an engine of decode"),
        ({"plan_digest": "0" * 64}, True, "is an engine of prefill for plan 000"),
        ({"details": {"plugin_library": LIBRARY}}, True, "carries its own"),
        ({}, False, f"has no {LIBRARY}"),
    ],
)
def test_a_tensorrt_engine_is_checked_before_it_is_loaded(tmp_path, change, library, sentence):
    facts = {"target": "tensorrt", "stage": "prefill", "status": "built", "dtype": "float16"}
    built = TargetResult(**facts | {"plan_digest": PLAN.digest, "details": {"plugin_library": "Python forms"}} | change)
    (tmp_path / "engine.json").write_text(built.model_dump_json())
    if library:
        (tmp_path / LIBRARY).touch()
    engine = EngineConfig(executor="tensorrt", path=str(tmp_path), stage="prefill")
    if sentence is None:
        check_engine(tmp_path, engine, PLAN)
    else:
        with pytest.raises(RuntimeError, match=sentence):
            check_engine(tmp_path, engine, PLAN)


def test_an_empty_folder_is_no_engine(tmp_path):
    engine = EngineConfig(executor="tensorrt", path=str(tmp_path), stage="prefill")
    with pytest.raises(RuntimeError, match=r"holds no engine .*build the bundle again"):
        check_engine(tmp_path, engine, PLAN)


def test_executors_are_found_by_name_and_refused_in_one_sentence(tmp_path):
    def load(executor):
        load_engine(EngineConfig(executor=executor, path=str(tmp_path), stage="prefill"), PLAN, lambda *_: None)

    with pytest.raises(RuntimeError, match="executor 'tvm' is unknown; use torch, onnxruntime, tensorrt"):
        load("tvm")
    with pytest.raises(RuntimeError, match="onnxruntime cannot load this graph"):
        load("onnxruntime")
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match=r"executor tensorrt needs .*; use --executor torch"):
            load("tensorrt")


@pytest.mark.parametrize("engine", [{"executor": "onnxruntime"}, {"executor": "x", "path": "p", "stage": "both"}])
def test_a_worker_told_of_no_valid_engine_says_how_to_start_it(engine):
    config = SimpleNamespace(pdtrim_engine=engine)
    with pytest.raises(RuntimeError, match=r"pdtrim_engine.* in --json-model-override-args.*with pdtrim-deploy serve"):
        WorkerConfig.of_model(config)


def test_a_worker_started_without_its_engine_says_how_to_start_it(monkeypatch):
    from pdtrim_sglang.models import stage

    monkeypatch.setattr(stage, "get_parallel", lambda: SimpleNamespace(tp_size=1))
    for name in ("RadixAttention", "ParallelLMHead", "LogitsProcessor"):
        monkeypatch.setattr(stage, name, lambda *_, **__: torch.nn.Identity())
    sizes = SimpleNamespace(num_attention_heads=4, hidden_size=64, num_hidden_layers=2, vocab_size=8)
    with pytest.raises(RuntimeError, match=r"names no pdtrim_engine: start workers with pdtrim-deploy serve"):
        stage.PDTrimStageForCausalLM(sizes)


def test_the_command_line_says_what_the_worker_reads(tmp_path):
    from pdtrim_deploy.serving import Engine

    config = WorkerConfig(engine=Engine("onnxruntime", "decode", tmp_path).as_config())
    override = json.loads(json.dumps(config.override()))
    assert WorkerConfig.parse(json.dumps(override)) == config
    assert WorkerConfig.of_model(SimpleNamespace(**override)) == config
    assert config.engine.path == str(tmp_path)
