"""The oracle behind fp8 KV pools, against transformers with a cache that rounds what it is given."""

import pytest
import torch
import transformers
from tinypd import BLOCKS, DIM, FAMILIES, make_oracle, make_plan, text, tiny

from pdtrim_deploy.evaluation.fidelity.sensitivity import _shaken, _unrounded
from pdtrim_deploy.kvchoice.budget.prompt_kv import PromptKV
from pdtrim_deploy.plan import KVSend
from pdtrim_deploy.plan.wire import FP8_ROWS

POOLS = tuple(FP8_ROWS)


class RoundingCache(transformers.DynamicCache):
    """As SGLang's fp8 pool without scales: rows are rounded when they are written, and read as they are then."""

    dtype = torch.float8_e4m3fn

    def update(self, keys, values, *args, **kwargs):
        return super().update(*(rows.to(self.dtype).to(rows.dtype) for rows in (keys, values)), *args, **kwargs)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("pool_dtype", POOLS)
def test_rows_of_both_stages_are_rounded_before_attention_reads_them(family, pool_dtype):
    model, ids = tiny(family), text(1, 30)
    cache = RoundingCache()
    cache.dtype = getattr(torch, FP8_ROWS[pool_dtype])
    with torch.no_grad():
        logits = [model(ids[:, :12], past_key_values=cache, use_cache=True).logits[:, -1]]
        logits += [
            model(ids[:, at : at + 1], past_key_values=cache, use_cache=True).logits[:, -1] for at in range(12, 29)
        ]
    expected = torch.cat(logits).log_softmax(-1).gather(1, ids[0, 12:, None])[:, 0]
    oracle, native = (make_oracle(model, make_plan(pool_dtype=pool)) for pool in (pool_dtype, "native"))
    torch.testing.assert_close(oracle.logprobs(ids[0, :12], ids[0, 12:]), expected, rtol=0, atol=1e-4)
    assert (native.logprobs(ids[0, :12], ids[0, 12:]) - expected).abs().max() > 1e-3


@pytest.mark.parametrize("wire", ["native", "int4"])
def test_decode_holds_values_of_the_pool_and_adds_such(wire):
    if not KVSend(wire_dtype=wire).suits(DIM):
        pytest.skip("tiny heads")
    oracle = make_oracle(tiny("Qwen3"), make_plan(kv=(KVSend(wire_dtype=wire),) * BLOCKS, pool_dtype="fp8_e4m3"))
    ids, fp8 = text(2, 20), torch.float8_e4m3fn
    state = oracle.prefill(ids[:, :12])
    held = oracle.hand_over(state)
    oracle.extend(ids[:, 12:], 12, held)
    assert all(pool.dtype == fp8 for pool in (*state.keys, *state.values))
    for kv in held:
        assert kv.keys.shape[2] == 20
        assert all(torch.equal(rows, rows.to(fp8).to(rows.dtype)) for rows in (kv.keys, kv.values))


def test_kv_is_chosen_behind_the_pool(tmp_path):
    """What the byte budget measures is what decode holds, and what it writes itself is rounded there too."""
    oracle = make_oracle(tiny("Qwen3"), make_plan(pool_dtype="fp8_e4m3"))
    ids = text(2, 20)
    state = oracle.prefill(ids[:, :16])
    prompt_kv = PromptKV(oracle, state, ("native",), tmp_path)
    for layer, kv in enumerate(oracle.hand_over(state)):
        read = prompt_kv.read("native", layer, ((0, 16),))
        assert torch.equal(read.keys, kv.keys)
        assert read.pool == kv.pool == torch.float8_e4m3fn


@pytest.mark.parametrize("pool_dtype", POOLS)
def test_noise_moves_codes_as_often_as_it_is_large_beside_their_cells(pool_dtype):
    dtype = getattr(torch, FP8_ROWS[pool_dtype])
    codes = torch.arange(-128, 128).to(torch.int8).view(dtype)
    codes = codes[codes.float().isfinite()]
    for place in (-0.499, 0.499, 0.0):  # within its cell a value becomes its code again
        values = codes.float() + _unrounded(codes, torch.full(codes.shape, place))
        assert torch.equal(values.to(dtype).float(), codes.float())
    for place in (-0.501, 0.501):  # and just outside another, but for the largest
        values = codes.float() + _unrounded(codes, torch.full(codes.shape, place))
        same = values.to(dtype).float() == codes.float()
        assert set(codes[same].float().abs().tolist()) <= {torch.finfo(dtype).max}
    pool, size = torch.full((4000, 1, 16), 1.25).to(dtype), torch.finfo(dtype).eps
    for noise in (size / 20, size / 5):
        moved = (_shaken(pool, noise / 1.25, torch.Generator().manual_seed(0))[4000:].float() != 1.25).float().mean()
        assert moved == pytest.approx(0.8 * noise / size, rel=0.1)  # mean size of noise over the cell
