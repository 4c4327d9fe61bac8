"""Served by genuine SGLang, every wire dtype computes what the oracle says, and sends the bytes of the arithmetic.

`mixed` has all four and other sizes in every layer, on pages and chunks that end elsewhere than its windows; int4 is
the one that rounds most. By hand, for each: `pdtrim-deploy fidelity` on `python tests/bundle_variants.py BUNDLE OUT`.
"""

import httpx
import pytest
from bundle_variants import all_in, mixed, variant

from pdtrim_deploy.evaluation.fidelity import run_fidelity
from pdtrim_deploy.wire import WIRE_DTYPES

pytestmark = [pytest.mark.serve, pytest.mark.model, pytest.mark.timeout(900)]
LENGTHS = [1, 3, 64, 97, 144, 200, 333]


@pytest.mark.parametrize(
    ("rules", "options"),
    [(mixed, {"page_size": 16, "chunked_prefill_size": 64}), (lambda bundle: all_in("int4", bundle), {})],
    ids=["mixed", "int4"],
)
def test_served_as_planned(rules, options, bundle, serving, transfers, real_cache, tmp_path):
    bundle = variant(bundle, rules(bundle), tmp_path / "bundle")
    if rules is mixed:
        assert {send.wire_dtype for send in bundle.plan.kv} == set(WIRE_DTYPES)
        assert len({(send.n_first, send.n_last) for send in bundle.plan.kv}) == 6
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
