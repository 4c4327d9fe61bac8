"""Rows of finished layers leave while prefill computes later ones: a genuine pair gives the oracle's answers."""

from dataclasses import replace

import httpx
import pytest

from pdtrim_deploy.evaluation.fidelity import run_fidelity
from pdtrim_deploy.serving import Cluster, ClusterSpec, ServeEnvironment, WorkerOptions
from pdtrim_deploy.serving.metrics import scrape

pytestmark = [pytest.mark.serve, pytest.mark.model, pytest.mark.timeout(900), pytest.mark.xdist_group("tiny bundle")]


def test_fidelity_of_rows_that_leave_layer_by_layer(no_shared_pairs, mixed_bundle, real_cache, tmp_path):
    """Chunks of 64 tokens, pages of 16, batches and aborted requests are among the check's own cases."""
    options = WorkerOptions(page_size=16, chunked_prefill_size=64, dtype="float32", sparse=True, send_by_layer=True)
    stages = mixed_bundle.prefill_dir, mixed_bundle.decode_dir
    spec = ClusterSpec.on_loopback(*stages, options=options, start_timeout_s=420.0)
    small_parts = tuple(replace(worker, transport={"part_bytes": 1}) for worker in spec.workers)
    spec = replace(spec, workers=small_parts)
    with Cluster(spec, ServeEnvironment.find(), tmp_path) as cluster:
        result = run_fidelity(mixed_bundle, cluster.url, real_cache)
        samples = scrape(cluster.workers[0].metrics_url)
        alike, alone = answers(cluster.url, 8), answers(cluster.url, 1)
    assert result.problems == []
    assert all(result.controls_detected.values())
    payload, early = (sum(s.value for s in samples[f"pdtrim_kv_{name}_bytes_sum"]) for name in ("payload", "early"))
    assert 0.1 < early / payload < 1
    for answer in alike:
        assert answer == pytest.approx(alone[0], abs=1e-3)


def answers(url, samples):
    """Log-probabilities of as many greedy answers to a prompt of more than a page, of which a pass computes three."""
    prompt = [3 + 7 * place % 250 for place in range(20)]
    sampling = {"max_new_tokens": 6, "temperature": 0, "ignore_eos": True, "n": samples}
    body = {"input_ids": prompt, "sampling_params": sampling, "return_logprob": True}
    reply = httpx.post(f"{url}/generate", json=body, timeout=120).raise_for_status().json()
    scored = [reply] if samples == 1 else reply
    return [[entry[0] for entry in answer["meta_info"]["output_token_logprobs"]] for answer in scored]
