"""Decode attention of SGLang's backends under a sparse plan: all give the answer that the rule gives."""

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("sglang", reason="needs the serve environment")

from decodeworker import CONTEXT, DIM, KV_HEADS, DecodeWorker, Request, history, layer_of, make_plan, sglang, sparse

from pdtrim_deploy.plan import KVSend

sends = st.one_of(st.just(KVSend()), st.builds(sparse, st.integers(0, 6), st.integers(1, 9)))
pool_sizes = st.none() | st.builds(lambda isl, osl: {"isl": isl, "osl": osl}, st.integers(8, 30), st.integers(4, 20))


@pytest.fixture(scope="module", autouse=True)
def server():
    with sglang():
        yield


def close(answer, expected):
    torch.testing.assert_close(answer, expected, rtol=1e-5, atol=1e-6)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(sends, min_size=1, max_size=4), st.sampled_from([1, 4, 16]), pool_sizes, st.integers(0, 999))
def test_torch_native_gives_the_rules_answer_and_all_slots_come_back(tmp_path, layers, page_size, sizes, seed):
    torch.manual_seed(seed)
    if all(send.mode == "full" for send in layers):
        sizes = None
    worker = DecodeWorker(tmp_path, make_plan(layers), page_size, sizes)
    history(worker, random.Random(seed), 12, close)


def test_with_another_rule_the_answer_is_another(tmp_path):
    """So the comparison above can fail: one row more or less in one layer is seen."""
    torch.manual_seed(0)
    worker = DecodeWorker(tmp_path, make_plan([KVSend(), sparse(2, 3)]))
    assert worker.admit(Request(*torch.randn(2, 2, 20, KV_HEADS, DIM)))
    close(*worker.step())
    for other in (sparse(2, 4), sparse(1, 3), KVSend()):
        worker.plan = make_plan([KVSend(), other])
        answer, expected = worker.step()
        assert (answer - expected)[0].abs().max() < 1e-5
        assert (answer - expected)[1].abs().max() > 1e-3


def test_an_uncut_plan_has_sglangs_own_pool_and_backend(tmp_path):
    from pdtrim_sglang.cpu.torch_attention import TorchAttention
    from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

    worker = DecodeWorker(tmp_path, make_plan([KVSend(), KVSend(wire_dtype="int8")]))
    assert type(worker.backend) is TorchAttention  # torch_native with what it lacks, which no layer here asks for
    assert type(worker.pool) is MHATokenToKVPool


def test_a_whole_batch_of_padding_writes_to_the_slots_of_nobody(tmp_path):
    """What SGLang runs to warm up and to pad: row 0, one token, slot 0."""
    worker = DecodeWorker(tmp_path, make_plan([KVSend(), sparse(1, 2)]), 4)
    nobody = torch.zeros(3, dtype=torch.int64)
    batch = worker.forward_batch(nobody, nobody + 1, nobody)
    worker.backend.init_forward_metadata(batch)
    worker.attend(batch, *worker.new_rows(3))
    for buffer in (*worker.pool.k_buffer, *worker.pool.v_buffer):
        assert bool((buffer[1:] == 1e3).all())
        assert bool((buffer[0] != 1e3).all())


def test_a_model_that_writes_rows_by_itself_is_refused(tmp_path):
    """It knows SGLang's slots alone, and would write the rows of cut layers to those of others."""
    worker = DecodeWorker(tmp_path, make_plan([KVSend(), sparse(1, 2)]))
    nobody = torch.zeros(1, dtype=torch.int64)
    batch = worker.forward_batch(nobody, nobody + 1, nobody)
    worker.backend.init_forward_metadata(batch)
    (q, *_), (k, *_), (v, *_) = worker.new_rows(1)
    worker.backend.forward(q, k, v, layer_of(0), batch, False)
    with pytest.raises(RuntimeError, match="this model writes K and V past the attention backend"):
        worker.backend.forward(q, k, v, layer_of(1), batch, False)


def test_a_request_as_long_as_the_context_allows(tmp_path):
    torch.manual_seed(0)
    worker = DecodeWorker(tmp_path, make_plan([KVSend(), sparse(4, 0)]), 4, {"isl": 8, "osl": 40})
    assert worker.admit(Request(*torch.randn(2, 2, 9, KV_HEADS, DIM)))
    while worker.running[0].length < CONTEXT:
        close(*worker.step())


# torch_native is compared above, step by step; the others run in Triton's interpreter, which is chosen before Triton
# loads.
STEPS = {"triton": 5, "flashinfer": 12, "fa3": 12, "trtllm_mha": 12}


@pytest.fixture(scope="module")
def interpreted():
    """What ran them, each in a process of its own."""
    child = Path(__file__).with_name("interpreted_attention_child.py")
    env = os.environ | {"TRITON_INTERPRET": "1", "SGLANG_USE_CPU_ENGINE": "1", "PYTHONPATH": str(child.parent.parent)}
    command = [sys.executable, child, *(str(word) for pair in STEPS.items() for word in pair)]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=290, check=True)


@pytest.mark.parametrize("backend", STEPS)
def test_a_backend_with_cuda_graphs_gives_the_rules_answer(interpreted, backend):
    assert f"{backend} ended with 0\n" in interpreted.stdout, interpreted.stderr[-3000:]
