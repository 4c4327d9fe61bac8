"""Genuine SGLang workers that divide attention among unlike numbers of ranks compute what the oracle does, on a CPU.

Of the tiny bundle with all wire dtypes, on pages of 16 and chunks of 64. Its two KV heads go from four ranks, which
hold two copies of each, to one, and from one to four such. On a CPU SGLang pads heads where it copies them on a GPU:
that is left out (unpadded.py). Ranks without copies: test_dp_attention.py, and, in native rows,
the fault tests.
"""

import httpx
import pytest

from pdtrim_deploy.evaluation.fidelity import run_fidelity

pytestmark = [pytest.mark.serve, pytest.mark.model, pytest.mark.timeout(900), pytest.mark.xdist_group("tiny bundle")]
OPTIONS = {"dtype": "float32", "page_size": 16, "chunked_prefill_size": 64}
LENGTHS = (1, 40, 97, 333)


@pytest.mark.parametrize(("prefill", "decode"), [(4, 1), (1, 4)])
def test_served_tokens_are_the_oracles_and_bytes_the_arithmetics(
    mixed_bundle, serving, transfers, real_cache, prefill, decode
):
    ranks, plan = {"tp_prefill": prefill, "tp_decode": decode}, mixed_bundle.plan
    with serving(mixed_bundle.prefill_dir, mixed_bundle.decode_dir, **ranks, **OPTIONS) as cluster:
        result = run_fidelity(mixed_bundle, cluster.url, real_cache, new_tokens=4)
        assert result.passed, result.problems
        assert any(row.cached_tokens for row in result.rows)
        before = transfers(cluster)
        for length in LENGTHS:
            body = {
                "input_ids": list(range(500, 500 + length)),
                "sampling_params": {"max_new_tokens": 2, "temperature": 0},
            }
            assert httpx.post(f"{cluster.url}/generate", json=body, timeout=120).status_code == 200
        after = transfers(cluster, prefill * len(LENGTHS), before)  # each rank counts its requests
    moved = {name: after[name] - before[name] for name in after}
    copies = max(1, decode // plan.model.num_kv_heads)  # each rank of decode gets one of its own
    assert moved["payload"] == copies * sum(map(plan.payload_bytes, LENGTHS))
    assert moved["dense"] == copies * sum(map(plan.dense_bytes, LENGTHS))
    assert moved["success"] == prefill * len(LENGTHS)
