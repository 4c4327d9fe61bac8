"""Served by genuine SGLang, wire dtypes compute what the oracle says, and send the bytes of the arithmetic.

One plan has all of them, and sizes that differ from layer to layer, on pages and chunks that end elsewhere than its
windows. Each by itself, by hand: `python tests/bundle_variants.py BUNDLE OUT`, then `pdtrim-deploy fidelity OUT/int4`.
"""

import httpx
import pytest
from bundle_variants import mixed, variant

from pdtrim_deploy.evaluation.fidelity import run_fidelity
from pdtrim_deploy.wire import WIRE_DTYPES

pytestmark = [pytest.mark.serve, pytest.mark.model, pytest.mark.timeout(900)]
LENGTHS = [1, 3, 64, 97, 144, 200, 333]


def test_all_wire_dtypes_in_one_plan(bundle, serving, transfers, real_cache, tmp_path):
    bundle = variant(bundle, mixed(bundle), tmp_path / "bundle")
    assert {send.wire_dtype for send in bundle.plan.kv} == set(WIRE_DTYPES)
    assert len({(send.n_first, send.n_last) for send in bundle.plan.kv}) == 6
    options = {"page_size": 16, "chunked_prefill_size": 64}
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
    assert result.passed, result.problems
    assert result.requests >= 24
    assert "native on the wire" in result.controls_detected
