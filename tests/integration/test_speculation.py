"""Decode verifies drafted tokens under a plan without cut layers, in genuine workers: the oracle's tokens, faster.

What SGLang lacks of kernels on a CPU is torch's (speculation_kernels.py); transfer, scheduler, drafts and pools are the
real ones.
"""

import re

import httpx
import pytest
from tinyrecipe import words_recipe
from tinytext import write_words

from pdtrim_deploy.evaluation.fidelity import run_fidelity
from pdtrim_deploy.gpucheck import tiny
from pdtrim_deploy.gpucheck.options import NGRAM
from pdtrim_deploy.models.loading import load_tokenizer
from pdtrim_deploy.pipeline import build
from pdtrim_deploy.serving.metrics import scrape, total

pytestmark = [pytest.mark.serve, pytest.mark.timeout(900)]
EAGLE = (
    "--speculative-algorithm", "EAGLE", "--speculative-num-steps", "1", "--speculative-eagle-topk", "1",
    "--speculative-num-draft-tokens", "2",
)  # fmt: skip


@pytest.fixture(scope="module")
def bundle(tiny_model, cache, tmp_path_factory):
    folder = tmp_path_factory.mktemp("drafted")
    text = write_words(folder / "text", files=60, words=1600)
    recipe = words_recipe(tiny_model(folder / "model"), text, {"method": "none", "wire_dtype": "int8"})
    return build(recipe, folder / "bundle", cache)


def test_drafts_from_the_text_change_nothing(bundle, serving, cache):
    options = {"dtype": "float32", "page_size": 16, "decode_args": NGRAM}
    with serving(bundle.prefill_dir, bundle.decode_dir, **options) as pair:
        result = run_fidelity(bundle, pair.url, cache, new_tokens=16)
        assert result.passed, result.problems
        samples = scrape(pair.workers[1].metrics_url)
        assert total(samples, "sglang:spec_accept_length") > 1, "no drafted token was accepted"
        verified = total(samples, "sglang:spec_verify_calls_total")
        letter = load_tokenizer(bundle.decode_dir).decode([77])
        assert answer(pair, logit_bias={"77": 100.0}) == letter * 24
        verified = total(scrape(pair.workers[1].metrics_url), "sglang:spec_verify_calls_total") - verified
        assert 0 < verified < 23, "of 24 tokens decode draws 23, a call each if no drafted one is accepted"
        assert re.fullmatch("[b-d]{5}x", answer(pair, regex="[b-d]{5}x"))


def answer(pair, **options):
    """Text of at most 24 tokens."""
    body = {"model": "pdtrim", "prompt": "Give a", "max_tokens": 24, "temperature": 0} | options
    response = httpx.post(f"{pair.url}/v1/completions", json=body, timeout=120)
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["text"]


def test_a_draft_models_kv_travels_and_changes_nothing(bundle, serving, cache, tmp_path):
    """EAGLE by a random model: one token is drafted a step, and hardly one is accepted."""
    draft = tiny.save_draft(tmp_path / "draft", tiny.Size(6, 64, 128, 4, 2, 16))
    arguments = (*EAGLE, "--speculative-draft-model-path", str(draft))
    options = {"dtype": "float32", "page_size": 16, "prefill_args": arguments, "decode_args": arguments}
    with serving(bundle.prefill_dir, bundle.decode_dir, **options) as pair:
        result = run_fidelity(bundle, pair.url, cache, new_tokens=8)
        assert result.passed, result.problems
        prefill, decode = (scrape(worker.metrics_url) for worker in pair.workers)
    tokens = total(prefill, "pdtrim_kv_prompt_tokens_sum")
    assert total(prefill, "pdtrim_kv_draft_bytes_sum") == tokens * 2 * 2 * 16 * 4  # one layer's K and V in float32
    assert total(decode, "sglang:spec_verify_calls_total")
