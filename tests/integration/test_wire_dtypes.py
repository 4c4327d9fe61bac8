"""Served by genuine SGLang, wire dtypes compute what the oracle says, and send the bytes of the arithmetic.

One plan has all of them, and sizes that differ from layer to layer, on pages and chunks that end elsewhere than its
windows; decode holds its sparse layers in pools of their own, one a window. Each wire dtype by itself, by hand:
`python tests/bundle_variants.py BUNDLE OUT`, then `pdtrim-deploy fidelity OUT/int4`.
"""

import re

import httpx
import pytest
from bundle_variants import mixed, variant

from pdtrim_deploy.decode_pool import SplitPool, request_bytes
from pdtrim_deploy.evaluation.fidelity import run_fidelity
from pdtrim_deploy.plan import KVSend
from pdtrim_deploy.wire import WIRE_DTYPES

pytestmark = [pytest.mark.serve, pytest.mark.model, pytest.mark.timeout(900)]
SPLIT = SplitPool(isl=400, osl=16)
LENGTHS = [1, 3, 64, 97, 144, 200, 333]


def test_all_wire_dtypes_in_one_plan(bundle, serving, transfers, real_cache, tmp_path):
    bundle = variant(bundle, mixed(bundle), tmp_path / "bundle")
    assert {send.wire_dtype for send in bundle.plan.kv} == set(WIRE_DTYPES)
    assert len({(send.n_first, send.n_last) for send in bundle.plan.kv}) == 6
    options = {"page_size": 16, "chunked_prefill_size": 64, "split_pool": SPLIT}
    with serving(bundle.prefill_dir, bundle.decode_dir, dtype="float32", **options) as pair:
        before = transfers(pair)
        for length in LENGTHS:
            prompt = list(range(500, 500 + length))
            body = {"input_ids": prompt, "sampling_params": {"max_new_tokens": 2, "temperature": 0}}
            assert httpx.post(f"{pair.url}/generate", json=body, timeout=120).status_code == 200
        after = transfers(pair)
        assert after["success"] - before.get("success", 0) == len(LENGTHS)
        assert after["payload"] - before["payload"] == sum(map(bundle.plan.payload_bytes, LENGTHS))
        result = run_fidelity(bundle, pair.url, real_cache, new_tokens=8)
        said = re.search(r"pool split for 400 \+ 16 tokens: .*; ([\d.]+)% of one pool", pair.workers[1].log.read_text())
    assert result.passed, result.problems
    assert result.requests >= 24
    whole = tuple(KVSend() for _ in bundle.plan.kv)
    share, of_one = (request_bytes(bundle.plan.model, kv, SPLIT.isl, SPLIT.osl) for kv in (bundle.plan.kv, whole))
    assert said is not None
    assert float(said[1]) == pytest.approx(100 * share / of_one, abs=1)
    assert "native on the wire" in result.controls_detected
