"""`n` through the genuine router and workers: each sample is the answer that its prompt alone gets, and nothing stays.

A tiny random model whose stages differ; pages, chunks and cut rows end at different tokens. Short prompts share a
chunk, so that samples are computed side by side; long ones hit the prefix cache from the second sample on.
"""

import json
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from unlikestages import SPARSE, unlike_plan, write_stages

from pdtrim_deploy.models import open_checkpoint
from pdtrim_deploy.plan import KVSend
from pdtrim_deploy.serving.metrics import scrape, total

pytestmark = [pytest.mark.serve, pytest.mark.timeout(900)]
TEXT = "Row upon row the orchard stood in white, and every tree in it hummed with bees until the sun went down. "
PROMPTS = ["Snow.", TEXT[:45], TEXT + TEXT[:60]]  # 5, 45 and 163 tokens of a byte each
HELD = ("num_running_reqs", "num_waiting_reqs", "num_used_tokens")
NEW = 12


@pytest.fixture(scope="module")
def plan_and_pair(tiny_model, tmp_path_factory, real_cache, serving):
    folder = tmp_path_factory.mktemp("tiny")
    checkpoint = open_checkpoint(tiny_model(folder / "model", max_position_embeddings=2048), real_cache)
    plan = unlike_plan(checkpoint, (KVSend(), SPARSE, SPARSE.model_copy(update={"n_last": 9}), SPARSE))
    write_stages(checkpoint, folder, plan)
    options = {"page_size": 16, "chunked_prefill_size": 64, "max_total_tokens": 4096, "threads": 1}
    with serving(folder / "prefill", folder / "decode", dtype="float32", **options) as cluster:
        yield plan, cluster


@pytest.fixture(scope="module")
def pair(plan_and_pair):
    return plan_and_pair[1]


def body_of(path, prompts, **changes):
    """A request to `path` for NEW tokens at temperature 0; `prompts`: a prompt, or a list of them."""
    options = {"temperature": 0.0, "ignore_eos": True} | changes
    if path == "/generate":
        return {"text": prompts, "sampling_params": {"max_new_tokens": NEW} | options}
    if path == "/v1/chat/completions":
        return {"model": "pdtrim", "messages": [{"role": "user", "content": prompts}], "max_tokens": NEW} | options
    return {"model": "pdtrim", "prompt": prompts, "max_tokens": NEW} | options


def texts(pair, path, body):
    """The answers in order."""
    reply = httpx.post(f"{pair.url}{path}", json=body, timeout=120)
    assert reply.status_code == 200, reply.text
    answer = reply.json()
    if path == "/generate":
        return [sample["text"] for sample in (answer if isinstance(answer, list) else [answer])]
    choices = sorted(answer["choices"], key=lambda choice: choice["index"])
    assert [choice["index"] for choice in choices] == list(range(len(choices)))
    return [choice["message"]["content"] if "chat" in path else choice["text"] for choice in choices]


def streamed(pair, path, body):
    """As `texts`, joined from a stream's parts."""
    parts = {}
    with httpx.stream("POST", f"{pair.url}{path}", json=body | {"stream": True}, timeout=120) as reply:
        assert reply.status_code == 200, reply.read()
        for line in reply.iter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line[6:])
            if path == "/generate":  # the text so far
                parts[event.get("index", 0)] = event["text"]
            for choice in event.get("choices", ()):
                part = choice["delta"].get("content") if "chat" in path else choice["text"]
                parts[choice["index"]] = parts.get(choice["index"], "") + (part or "")
    return [parts[index] for index in sorted(parts)]


def held(pair):
    """What both workers hold, by SGLang's count and by ours."""
    counts = {}
    for worker in pair.workers:
        (load,) = httpx.get(f"{worker.spec.url}/v1/loads", timeout=60).json()["loads"]
        counts |= {f"{worker.spec.name} {name}": load[name] for name in HELD}
        counts[f"{worker.spec.name} rooms"] = total(scrape(worker.metrics_url), "pdtrim_kv_open_requests")
    return counts


def left_behind(pair, within_s=120.0):
    deadline = time.monotonic() + within_s
    while any((over := {name: now for name, now in held(pair).items() if now}).values()):
        if time.monotonic() > deadline:
            break
        time.sleep(0.5)
    return over


@pytest.mark.parametrize("read", [texts, streamed])
@pytest.mark.parametrize("path", ["/generate", "/v1/completions", "/v1/chat/completions"])
def test_each_sample_at_temperature_0_is_the_one_answer(pair, path, read):
    for prompt in PROMPTS:
        (alone,) = read(pair, path, body_of(path, prompt))
        assert alone
        assert read(pair, path, body_of(path, prompt, n=3)) == [alone] * 3
    assert left_behind(pair) == {}


@pytest.mark.parametrize("read", [texts, streamed])
def test_samples_of_several_prompts_stand_prompt_by_prompt(pair, read):
    path = "/v1/completions"
    alone = [read(pair, path, body_of(path, prompt))[0] for prompt in PROMPTS]
    assert len(set(alone)) == len(PROMPTS)
    assert read(pair, path, body_of(path, PROMPTS)) == alone
    assert read(pair, path, body_of(path, PROMPTS, n=2)) == [text for text in alone for _ in range(2)]


def test_the_kv_of_a_prompt_travels_once_a_sample(plan_and_pair, transfers):
    plan, pair = plan_and_pair
    before = transfers(pair)
    assert len(texts(pair, "/v1/completions", body_of("/v1/completions", PROMPTS, n=3))) == 9
    after = transfers(pair, 9, before)
    assert after["success"] - before.get("success", 0) == 9
    assert after["payload"] - before["payload"] == 3 * sum(plan.payload_bytes(len(prompt)) for prompt in PROMPTS)


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize("seed", [{}, {"seed": 11}])
def test_drawn_samples_differ(pair, path, seed):
    body = body_of(path, PROMPTS[1], n=4, temperature=1.0, **seed)
    drawn = texts(
        pair, path, body | {"max_tokens": 4 * NEW}
    )  # of few bytes that are no characters some texts are alike
    assert len(set(drawn)) == 4


def test_every_sample_has_its_logprobs(pair):
    body = body_of("/generate", PROMPTS[1]) | {"return_logprob": True}
    alone = httpx.post(f"{pair.url}/generate", json=body, timeout=120).json()
    body["sampling_params"]["n"] = 2
    both = httpx.post(f"{pair.url}/generate", json=body, timeout=120).json()
    expected = [logprob for logprob, *_ in alone["meta_info"]["output_token_logprobs"]]
    assert len(both) == 2
    for sample in both:
        logprobs = [logprob for logprob, *_ in sample["meta_info"]["output_token_logprobs"]]
        assert logprobs == pytest.approx(expected, abs=1e-3)
    path = "/v1/chat/completions"
    choices = httpx.post(
        f"{pair.url}{path}", json=body_of(path, PROMPTS[1], n=2, logprobs=True, top_logprobs=2), timeout=120
    ).json()["choices"]
    first, second = ([token["logprob"] for token in choice["logprobs"]["content"]] for choice in choices)
    assert len(first) == NEW
    assert first == pytest.approx(second, abs=1e-3)


def test_beside_requests_of_one_sample(pair):
    path = "/v1/completions"
    alone = {prompt: texts(pair, path, body_of(path, prompt))[0] for prompt in PROMPTS}
    mixed = [(prompt, n) for prompt in PROMPTS for n in (1, 3, 1, 4)] * 2
    with ThreadPoolExecutor(12) as threads:
        answers = list(threads.map(lambda case: texts(pair, path, body_of(path, case[0], n=case[1])), mixed))
    assert answers == [[alone[prompt]] * n for prompt, n in mixed]
    assert left_behind(pair) == {}


def test_a_client_that_leaves_ends_all_samples(pair):
    path = "/v1/completions"
    (alone,) = texts(pair, path, body_of(path, PROMPTS[2]))
    for events in (1, 9):
        body = body_of(path, PROMPTS[2], n=4, max_tokens=600) | {"stream": True}
        with httpx.stream("POST", f"{pair.url}{path}", json=body, timeout=120) as reply:
            lines = (line for line in reply.iter_lines() if line.startswith("data:"))
            for _ in range(events):
                next(lines)
        assert left_behind(pair) == {}
    assert texts(pair, path, body_of(path, PROMPTS[2], n=4)) == [alone] * 4


@pytest.mark.parametrize("wrong", [{"n": 0}, {"n": -1}, {"n": "two"}])
def test_a_wrong_n_is_the_clients_fault(pair, wrong):
    path = "/v1/completions"
    reply = httpx.post(f"{pair.url}{path}", json=body_of(path, "Snow.", **wrong), timeout=120)
    assert 400 <= reply.status_code < 500, reply.text
