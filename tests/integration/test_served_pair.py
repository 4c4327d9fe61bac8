"""Genuine SGLang workers behind the genuine router serve a pruned model, and compute what the plan says.

SmolLM2, and a tiny model with all that can lie apart: all wire dtypes in one plan, rows that differ from layer to
layer, on pages and chunks that end elsewhere than its windows; decode holds its sparse layers in pools of their own,
one a window. Each wire dtype by itself, by hand: `python tests/bundle_variants.py BUNDLE OUT`, then
`pdtrim-deploy fidelity OUT/int4`.
"""

import json
import time

import httpx
import pytest

from pdtrim_deploy.evaluation import corpora
from pdtrim_deploy.evaluation.bundle_oracle import oracle_of
from pdtrim_deploy.evaluation.fidelity import judge, run_fidelity
from pdtrim_deploy.evaluation.fidelity.cases import Group
from pdtrim_deploy.evaluation.fidelity.client import ask
from pdtrim_deploy.models.loading import load_tokenizer
from pdtrim_deploy.serving.metrics import scrape

STAGING_BYTES = 8 << 20  # of SmolLM2's pair: a fourth of the default, which takes 3,400 tokens to fill

pytestmark = [pytest.mark.serve, pytest.mark.model, pytest.mark.timeout(900)]


@pytest.fixture(
    scope="module",
    params=[
        pytest.param("smollm2, page 1", marks=pytest.mark.xdist_group("smollm2")),
        pytest.param("mixed, page 16, chunks of 64", marks=pytest.mark.xdist_group("tiny bundle")),
    ],
)
def setting(request):
    return request.param


@pytest.fixture(scope="module")
def bundle(setting, request):
    """What `pair` serves."""
    return request.getfixturevalue("smollm2_bundle" if setting.startswith("smollm2") else "mixed_bundle")


@pytest.fixture
def pair(setting, bundle, shared_pair, request):
    if setting.startswith("mixed"):
        return request.getfixturevalue("mixed_pair")
    return shared_pair(bundle.prefill_dir, bundle.decode_dir, dtype="float32", staging_bytes=STAGING_BYTES)


def used_tokens(worker):
    return sum(sample.value for sample in scrape(worker.metrics_url)["sglang:num_used_tokens"])


def test_served_tokens_are_the_oracles(pair, bundle, real_cache):
    result = run_fidelity(bundle, pair.url, real_cache, new_tokens=8)
    assert result.requests >= 24
    assert any(row.cached_tokens > 200 for row in result.rows), "no prefix-cache hit was tried"
    assert result.passed, result.problems
    quantised = any(send.wire_dtype != "native" for send in bundle.plan.kv)
    assert ("native on the wire" in result.controls_detected) == quantised


def test_bytes_on_the_wire_equal_the_plans_arithmetic(pair, bundle, transfers):
    lengths = [1, 3, 40, 64, 67, 68, 69, 97, 144, 200, 333]
    before = transfers(pair)
    for length in lengths:
        body = {"input_ids": list(range(500, 500 + length)), "sampling_params": {"max_new_tokens": 2, "temperature": 0}}
        assert httpx.post(f"{pair.url}/generate", json=body, timeout=120).status_code == 200
    after = transfers(pair, len(lengths), before)
    moved = {name: after[name] - before[name] for name in after}
    assert moved["success"] == len(lengths)
    assert moved["payload"] == sum(map(bundle.plan.payload_bytes, lengths))
    assert moved["dense"] == sum(map(bundle.plan.dense_bytes, lengths))
    assert 0 < moved["wire"] - moved["payload"] < 4096 * len(lengths) * 6


def test_a_prompt_longer_than_the_staging_buffer_goes_in_several_chunks(pair, bundle, real_cache, request):
    if "chunks of 64" in request.node.name:
        pytest.skip("SGLang's own chunks of 64 tokens never fill the buffer, and take minutes")
    tokens = next(tokens for tokens in range(100, 1900, 100) if bundle.plan.payload_bytes(tokens) > STAGING_BYTES)
    tokenizer = load_tokenizer(bundle.prefill_dir)
    text = corpora.sequences(corpora.load("brown", real_cache).split("final"), tokenizer, 1, 1900, seed=3)
    prompt = text[0].tolist()[:tokens]
    group = Group("long", "in turn", (tuple(prompt),))
    served = [(group, response) for response in ask(pair.url, group, 4, 300.0)]
    result = judge(oracle_of(bundle, lambda _: None, None), served)
    assert result.max_logprob_error <= result.tolerance


def test_the_openai_endpoints_answer_streaming_and_not(pair):
    chat = {"model": "pdtrim", "messages": [{"role": "user", "content": "Name three colours."}]}
    completion = {"model": "pdtrim", "prompt": "The capital of France is"}
    for path, body in (("chat/completions", chat), ("completions", completion)):
        body |= {"max_tokens": 8, "temperature": 0}
        whole = httpx.post(f"{pair.url}/v1/{path}", json=body, timeout=120).json()
        assert whole["usage"]["completion_tokens"] > 0
        choice = whole["choices"][0]
        text = choice["message"]["content"] if "message" in choice else choice["text"]
        assert streamed(f"{pair.url}/v1/{path}", body) == text


def streamed(url, body):
    text, ended = "", False
    with httpx.stream("POST", url, json=body | {"stream": True}, timeout=120) as reply:
        assert reply.status_code == 200
        for line in reply.iter_lines():
            ended = ended or line == "data: [DONE]"
            if line.startswith("data: {"):
                for choice in json.loads(line[6:])["choices"]:
                    text += choice.get("text") or choice.get("delta", {}).get("content") or ""
    assert ended
    return text


def test_aborts_leave_nothing_behind(pair):
    prompt = {"input_ids": list(range(900, 1200))}
    body = prompt | {"sampling_params": {"max_new_tokens": 400, "ignore_eos": True}, "stream": True}
    for events in (45, 1, 2, 1):  # SGLang sets the gauge every 40 decode steps
        with httpx.stream("POST", f"{pair.url}/generate", json=body, timeout=120) as reply:
            lines = (line for line in reply.iter_lines() if line.startswith("data:"))
            for _ in range(events):
                next(lines)
            if events > 40:
                assert used_tokens(pair.workers[1]) >= 300, "the gauge does not see a running request"
    deadline = time.monotonic() + 120
    while (used := used_tokens(pair.workers[1])) and time.monotonic() < deadline:
        time.sleep(1)
    assert used == 0, f"decode still holds {used} tokens"
    body = {"text": "Once upon a time", "sampling_params": {"max_new_tokens": 4, "temperature": 0}}
    assert httpx.post(f"{pair.url}/generate", json=body, timeout=120).status_code == 200
