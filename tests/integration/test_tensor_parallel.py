"""Genuine SGLang workers that divide attention among unlike numbers of ranks compute what the oracle does, on a CPU.

Of the tiny bundle with all wire dtypes, on pages of 16 and chunks of 64. Two KV heads go from two ranks to one, from
one to two, and from one to four, of which two hold copies of a head.
"""

import pytest

from pdtrim_deploy.evaluation.fidelity import run_fidelity

pytestmark = [pytest.mark.serve, pytest.mark.model, pytest.mark.timeout(900), pytest.mark.xdist_group("tiny bundle")]
OPTIONS = {"dtype": "float32", "page_size": 16, "chunked_prefill_size": 64}


@pytest.mark.parametrize(("prefill", "decode"), [(2, 1), (1, 2), (4, 2)])
def test_served_tokens_are_the_oracles(mixed_bundle, serving, transfers, real_cache, prefill, decode):
    ranks = {"tp_prefill": prefill, "tp_decode": decode}
    with serving(mixed_bundle.prefill_dir, mixed_bundle.decode_dir, **ranks, **OPTIONS) as cluster:
        result = run_fidelity(mixed_bundle, cluster.url, real_cache, new_tokens=8)
        moved = transfers(cluster)
        assert result.passed, result.problems
        assert any(row.cached_tokens for row in result.rows)
    print(moved)
