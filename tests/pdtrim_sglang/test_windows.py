"""The decode index sets: first + last + generated tokens, for any batch."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pdtrim_sglang.attention.windows import Window, compact_table, hidden_tokens, kv_indices, layer_windows

from pdtrim_deploy.plan import KVSend, ModelShape, PDPlan


@given(
    st.lists(st.tuples(st.integers(0, 12), st.integers(1, 6)), min_size=1, max_size=5),
    st.integers(0, 6),
    st.integers(0, 6),
    st.randoms(),
)
def test_each_request_sees_exactly_first_last_and_generated(requests, first, last, random):
    context = 24
    table = torch.tensor([random.sample(range(1000), context) for _ in range(8)], dtype=torch.int32)
    rows = torch.tensor(random.sample(range(8), len(requests)))
    prompts = torch.tensor([prompt for prompt, _ in requests])
    lengths = torch.tensor([prompt + generated for prompt, generated in requests])
    slots, kept = compact_table(table, rows, lengths, prompts, Window(first, last))
    for i, (prompt, generated) in enumerate(requests):
        expected = [
            table[rows[i], p].item()
            for p in range(prompt + generated)
            if p < first or p >= prompt - last or first + last >= prompt
        ]
        assert slots[i, : kept[i]].tolist() == expected
    ragged = kv_indices(slots, kept)
    assert ragged.indptr.tolist() == [0, *itertools.accumulate(kept.tolist())]
    assert ragged.indices.tolist() == [slot for row, n in zip(slots.tolist(), kept, strict=True) for slot in row[:n]]
    assert ragged.last_page_len.tolist() == [1] * len(requests)


@given(st.integers(1, 30), st.integers(0, 60), st.integers(0, 6), st.integers(1, 6))
def test_a_row_that_says_more_of_a_prompt_than_there_is_hides_no_more_than_that(length, prompt, first, last):
    hidden = int(hidden_tokens(torch.tensor([length]), torch.tensor([prompt]), Window(first, last)))
    assert 0 <= hidden == max(0, min(prompt, length - 1) - first - last) < length


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("mapped", [True, False])
def test_the_lists_kernel_compiles_to_ptx(mapped, capability, tmp_path, monkeypatch):
    triton = pytest.importorskip("triton")
    from pdtrim_sglang.attention.triton_indices import BLOCK_TOKENS, list_slots_of_requests
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    constants = {"MAPPED": mapped, "BLOCK": BLOCK_TOKENS}
    pointers = dict.fromkeys(("rows", "hidden", "indices", "slot_map"), "*i64")
    signature = pointers | dict.fromkeys(("req_to_token", "indptr"), "*i32")
    signature |= dict.fromkeys(("row_stride", "n_first", "room"), "i32")
    named = {
        name: (signature | dict.fromkeys(constants, "constexpr"))[name] for name in list_slots_of_requests.arg_names
    }
    ptx = triton.compile(ASTSource(list_slots_of_requests, named, constants), target=GPUTarget("cuda", capability, 32))
    assert f".target sm_{capability}" in ptx.asm["ptx"]
    assert ".entry list_slots_of_requests" in ptx.asm["ptx"]


def test_each_sparse_layer_has_its_own_window():
    shape = ModelShape(architecture="X", fingerprint="f", num_blocks=4, num_kv_heads=1, head_dim=4, kv_dtype="float32")
    sparse = [KVSend(mode="sparse", n_first=n, n_last=m, wire_dtype=w) for n, m, w in ((0, 9, "int4"), (3, 0, "fp8"))]
    plan = PDPlan.dense(shape).with_kv((sparse[0], KVSend(wire_dtype="int8"), sparse[1], sparse[0]))
    assert layer_windows(plan) == {0: Window(0, 9), 2: Window(3, 0), 3: Window(0, 9)}
