"""Decode's ranks divide requests among each other (DP attention), whole heads in each: the oracle's tokens.

Of the tiny bundle with all wire dtypes, on a CPU: prefill's two ranks hold a head each, and both send to the rank of
decode that has the request. Of SGLang only the length of requests that pad a batch is ours (`pdtrim_sglang/cpu`).
"""

from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from pdtrim_deploy.evaluation.fidelity import run_fidelity
from pdtrim_deploy.gpucheck.options import DP_ATTENTION

pytestmark = [pytest.mark.serve, pytest.mark.model, pytest.mark.timeout(900), pytest.mark.xdist_group("tiny bundle")]
OPTIONS = {"dtype": "float32", "page_size": 16, "chunked_prefill_size": 64}
# by default SGLang exchanges logits by an operation that it has on GPUs alone
GATHERED = "--no-enable-tp-lm-head-all-to-all"
LENGTHS = (1, 40, 97, 333)


def generate(pair, tokens, new_tokens):
    sampling = {"max_new_tokens": new_tokens, "temperature": 0, "ignore_eos": True}
    response = httpx.post(f"{pair.url}/generate", json={"input_ids": tokens, "sampling_params": sampling}, timeout=120)
    assert response.status_code == 200, response.text
    return response.json()


def test_served_tokens_are_the_oracles_and_bytes_the_arithmetics(mixed_bundle, serving, transfers, real_cache):
    ranks, plan = {"tp_prefill": 2, "tp_decode": 2, "decode_args": (*DP_ATTENTION, GATHERED)}, mixed_bundle.plan
    with serving(mixed_bundle.prefill_dir, mixed_bundle.decode_dir, **ranks, **OPTIONS) as pair:
        result = run_fidelity(mixed_bundle, pair.url, real_cache, new_tokens=8)
        assert result.passed, result.problems
        prompts = [list(range(500, 500 + length)) for length in LENGTHS]
        before = transfers(pair)
        alone = [generate(pair, prompt, 8)["output_ids"] for prompt in prompts]
        after = transfers(pair)
        # beside each other in both ranks, whose batches have unlike sizes
        with ThreadPoolExecutor(8) as threads:
            answers = list(threads.map(lambda prompt: generate(pair, prompt, 8), prompts * 4))
        assert [answer["output_ids"] for answer in answers] == alone * 4
        assert {answer["meta_info"]["dp_rank"] for answer in answers} == {0, 1}
    moved = {name: after[name] - before[name] for name in after}
    assert moved["payload"] == sum(map(plan.payload_bytes, LENGTHS))
    assert moved["dense"] == sum(map(plan.dense_bytes, LENGTHS))
