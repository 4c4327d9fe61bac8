"""Decode attention of SGLang's backends under a sparse plan: the same answer from all, the one the rule gives."""

import itertools
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("sglang", reason="needs the serve environment")

from decodebatch import CONTEXT, DIM, KV_HEADS, Batch, make_plan, sparse

from pdtrim_deploy.plan import KVSend

sends = st.one_of(st.just(KVSend()), st.builds(sparse, st.integers(0, 6), st.integers(1, 9)))
requests = st.tuples(st.integers(1, 25), st.integers(1, CONTEXT - 25))
TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}


class Wrapper:
    """FlashInfer's decode wrapper, in torch: pages of one token from `indptr`, `indices`, `last_page_len`."""

    def __init__(self, workspace, layout, backend, use_tensor_cores):
        assert layout == "NHD"

    def begin_forward(self, indptr, indices, last_page_len, heads, kv_heads, dim, page_size, **options):
        assert (indptr.dtype, indices.dtype, last_page_len.dtype) == (torch.int32,) * 3
        assert page_size == 1
        assert last_page_len.tolist() == [1] * (len(indptr) - 1)
        assert len(indices) == indptr[-1]
        self.indptr, self.indices, self.group = indptr.tolist(), indices.long(), heads // kv_heads

    def forward(self, q, kv_cache, sm_scale, **options):
        out = torch.empty_like(q)
        for i, (start, stop) in enumerate(itertools.pairwise(self.indptr)):
            keys, values = (x[self.indices[start:stop]].repeat_interleave(self.group, 1) for x in kv_cache)
            weights = torch.softmax(torch.einsum("hd,nhd->hn", q[i], keys) * sm_scale, -1)
            out[i] = torch.einsum("hn,nhd->hd", weights, values)
        return out


def flashinfer_backend(batch, monkeypatch):
    """SparseFlashInferBackend over SGLang's own `forward_decode`; only what needs FlashInfer itself is stood in for."""
    from sglang.srt.layers.attention import flashinfer_backend as module

    updater = SimpleNamespace(
        num_qo_heads=4, num_kv_heads=KV_HEADS, head_dim=DIM, data_type=torch.float32, q_data_type=torch.float32
    )

    def init(self, runner, **_):
        self.req_to_token_pool, self.token_to_kv_pool = runner.req_to_token_pool, runner.token_to_kv_pool
        self.workspace_buffer, self.decode_backend, self.decode_use_tensor_cores = None, "fa2", False
        self.num_wrappers, self.decode_split_tile_size, self.indices_updater_decode = 1, None, updater
        self.decode_wrappers, self.decode_uses_dequant_workspace = [Wrapper(None, "NHD", "fa2", False)], False
        self.kv_cache_quant_method = SimpleNamespace(needs_global_scale=lambda: False)

    def plan_full(self, batch):
        rows = zip(batch.req_pool_indices, batch.seq_lens, strict=True)
        slots = [self.req_to_token_pool.req_to_token[row, :length] for row, length in rows]
        indptr = torch.tensor([0, *itertools.accumulate(len(s) for s in slots)], dtype=torch.int32)
        ones = torch.ones(len(slots), dtype=torch.int32)
        self.decode_wrappers[0].begin_forward(indptr, torch.cat(slots), ones, 4, KV_HEADS, DIM, 1)
        self.forward_metadata = module.DecodeMetadata(self.decode_wrappers)

    monkeypatch.setattr(module, "BatchDecodeWithPagedKVCacheWrapper", Wrapper, raising=False)
    monkeypatch.setattr(module.FlashInferAttnBackend, "__init__", init)
    monkeypatch.setattr(module.FlashInferAttnBackend, "init_forward_metadata", plan_full)
    from pdtrim_sglang.attention.flashinfer import SparseFlashInferBackend

    return SparseFlashInferBackend(batch.runner)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(sends, min_size=1, max_size=4), st.lists(requests, min_size=1, max_size=3), st.sampled_from([1, 4, 8]),
    st.integers(0, 99),
)  # fmt: skip
def test_flashinfer_indices_give_torch_natives_answer(tmp_path, monkeypatch, layers, asked, page_size, seed):
    from pdtrim_sglang.attention.torch_native import SparseTorchNativeBackend

    batch = Batch(tmp_path, make_plan(layers), asked, page_size, seed)
    native = SparseTorchNativeBackend(batch.runner)
    expected = batch.expected()
    with monkeypatch.context() as patch:
        paged = flashinfer_backend(batch, patch)
        for backend in (native, paged):
            if any(send.mode == "sparse" for send in layers):
                batch.note_prompts()
            torch.testing.assert_close(batch.decode(backend), expected, **TOLERANCE)


def test_without_the_window_the_answer_is_another(tmp_path):
    """So the comparison above can fail: one row more or less in one layer is seen."""
    from pdtrim_sglang.attention.torch_native import SparseTorchNativeBackend

    batch = Batch(tmp_path, make_plan([KVSend(), sparse(2, 3)]), [(20, 4)])
    backend = SparseTorchNativeBackend(batch.runner)
    batch.note_prompts()
    for other in (sparse(2, 4), sparse(1, 3), KVSend()):
        batch.plan = make_plan([KVSend(), other])
        wrong = batch.decode(backend) - batch.expected()
        assert wrong[0].abs().max() < 1e-5
        assert wrong[1].abs().max() > 1e-3


def test_sglangs_triton_kernel_gives_the_rules_answer():
    """The kernel itself, in Triton's interpreter: a process of its own, since that is chosen before Triton loads."""
    child = Path(__file__).with_name("triton_attention_child.py")
    env = os.environ | {"TRITON_INTERPRET": "1", "SGLANG_USE_CPU_ENGINE": "1", "PYTHONPATH": str(child.parent.parent)}
    run = subprocess.run([sys.executable, child], env=env, capture_output=True, text=True, timeout=240, check=False)
    assert run.stdout.strip().endswith("equal"), run.stderr[-3000:]
