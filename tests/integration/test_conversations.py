"""Decode keeps the prompt rows of earlier turns, and each answer is still what the whole prompt's rows would give.

The stages keep other blocks of a tiny Llama, and rows travel quantised: a row that decode has computed for its own
answer is another one than prefill sends for the same token in the next turn. Of a plan with cut layers the full ones
keep rows; those of cut layers are sent for each turn.
"""

import contextlib
import random
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from slowworker import scheduler, slowed
from unlikestages import unlike_plan, write_stages

from pdtrim_deploy.evaluation.fidelity import judge
from pdtrim_deploy.evaluation.fidelity.cases import Group
from pdtrim_deploy.evaluation.fidelity.client import Served
from pdtrim_deploy.models import open_checkpoint
from pdtrim_deploy.models.loading import load_model
from pdtrim_deploy.models.oracle import PDOracle
from pdtrim_deploy.plan import STAGES, KVSend, PDPlan
from pdtrim_deploy.serving.metrics import scrape, total

pytestmark = [pytest.mark.serve, pytest.mark.timeout(900)]
PAGE, CHUNK, POOL, VOCABULARY, NEW = 16, 64, 1024, 259, 20
REUSE = ("--disaggregation-decode-enable-radix-cache", "--max-total-tokens", str(POOL))
SYSTEM = random.Random("system").choices(range(3, VOCABULARY), k=5 * PAGE + 3)


@dataclass(frozen=True)
class Stages:
    """Prefill without block 3, decode without blocks 1 and 3: rows of four layers travel, each in its own dtype."""

    folder: Path
    plan: PDPlan


UNCUT = tuple(KVSend(wire_dtype=wire) for wire in ("int8", "k4v3", "fp8", "native"))
CUT = (
    KVSend(wire_dtype="int8"), KVSend(mode="sparse", n_first=5, n_last=40, wire_dtype="k4v3"),
    KVSend(mode="sparse", n_last=30, wire_dtype="fp8"), KVSend(),
)  # fmt: skip


CUT_ALONE = pytest.mark.parametrize("stages", [CUT], indirect=True, ids=["cut layers"])  # its full layers do it all


@pytest.fixture(scope="module", params=[UNCUT, CUT], ids=["uncut", "cut layers"])
def stages(request, tiny_model, cache, tmp_path_factory):
    folder = tmp_path_factory.mktemp("conversations")
    model = tiny_model(folder / "model", max_position_embeddings=2048, head_dim=32)
    checkpoint = open_checkpoint(model, cache)
    plan = unlike_plan(checkpoint, request.param)
    write_stages(checkpoint, folder, plan)
    return Stages(folder, plan)


@pytest.fixture(scope="module")
def oracle(stages):
    return PDOracle(*(load_model(stages.folder / stage, "float32") for stage in STAGES), stages.plan)


@pytest.fixture(scope="module")
def pair(serving, stages):
    """Pages of 16, chunks of 64, and a decode pool that two long conversations fill."""
    options = {"page_size": PAGE, "chunked_prefill_size": CHUNK, "dtype": "float32", "decode_args": REUSE}
    with serving(*(stages.folder / stage for stage in STAGES), **options) as cluster:
        yield cluster


def body_of(prompt, **sampling):
    sampling = {"max_new_tokens": NEW, "temperature": 0, "ignore_eos": True} | sampling
    return {"input_ids": prompt, "sampling_params": sampling, "return_logprob": True}


def ask(pair, prompt, **sampling):
    """Each sample of the answer."""
    reply = httpx.post(f"{pair.url}/generate", json=body_of(prompt, **sampling), timeout=120)
    assert reply.status_code == 200, reply.text
    answers = reply.json() if isinstance(reply.json(), list) else [reply.json()]
    samples = []
    for answer in answers:
        scored = answer["meta_info"]["output_token_logprobs"]
        logprobs, tokens = zip(*((entry[0], entry[1]) for entry in scored), strict=True)
        samples.append(Served(tuple(prompt), tokens, logprobs, answer["meta_info"]["cached_tokens"]))
    return samples


def hang_up(pair, prompt, events):
    """Begin an answer, and leave after so many events."""
    body = body_of(prompt, max_new_tokens=400) | {"stream": True}
    with httpx.stream("POST", f"{pair.url}/generate", json=body, timeout=120) as reply:
        lines = (line for line in reply.iter_lines() if line.startswith("data:"))
        for _ in range(events):
            next(lines)


class Conversation:
    """A system prompt that all share, then turns of 7 to 40 tokens and answers of `NEW`."""

    def __init__(self, name):
        self._rng, self.history = random.Random(name), list(SYSTEM)

    def say(self):
        """The next prompt."""
        self.history += self._rng.choices(range(3, VOCABULARY), k=self._rng.randint(7, 40))
        return list(self.history)

    def heard(self, served):
        self.history += served.tokens


def sent(pair):
    """Payload bytes, reused tokens and bytes so far."""
    names = ("payload_bytes", "reused_tokens", "reused_bytes")
    samples = scrape(pair.workers[0].metrics_url)
    return [sum(sample.value for sample in samples.get(f"pdtrim_kv_{name}_sum", ())) for name in names]


def transferred(pair):
    """Requests whose transfer prefill has counted: it does so when decode has acknowledged the last chunk."""
    samples = scrape(pair.workers[0].metrics_url).get("pdtrim_kv_requests_total", ())
    return sum(sample.value for sample in samples if sample.labels["outcome"] == "success")


def measured(pair, action, requests=1):
    """What `action` returns, and what was sent for its requests: payload bytes, reused tokens, reused bytes."""
    counted, before = transferred(pair), sent(pair)
    result, deadline = action(), time.monotonic() + 120
    while transferred(pair) < counted + requests:
        assert time.monotonic() < deadline, "prefill does not count its transfers"
        time.sleep(0.05)
    return result, [after - start for after, start in zip(sent(pair), before, strict=True)]


def check(oracle, served):
    result = judge(oracle, [(Group("turns", "in turn", ()), answer) for answer in served])
    assert result.max_logprob_error <= result.tolerance, [row.error for row in result.rows]
    assert result.error.typical <= result.allowed.typical


def whole(length):
    return length - length % PAGE


def test_ten_turns_send_only_what_decode_lacks_and_are_the_oracles(pair, stages, oracle):
    talk, served, earlier = Conversation("ten"), [], 0
    for _ in range(10):
        prompt = talk.say()
        (answer,), (payload, reused, spared) = measured(pair, lambda prompt=prompt: ask(pair, prompt))
        assert reused == whole(earlier), "decode reuses the earlier prompt's whole pages, and none of its own answer"
        assert spared == stages.plan.reused_bytes(whole(earlier))
        assert payload + spared == stages.plan.payload_bytes(len(prompt))
        talk.heard(answer)
        served.append(answer)
        earlier = len(prompt)
    assert len(talk.history) > 4 * CHUNK
    check(oracle, served)


@CUT_ALONE
def test_conversations_at_once_share_a_system_prompt(pair, oracle):
    talks, served = [Conversation(name) for name in "abc"], []
    with ThreadPoolExecutor(len(talks)) as pool:
        for _ in range(4):
            answers = list(pool.map(lambda talk: ask(pair, talk.say())[0], talks))
            for talk, answer in zip(talks, answers, strict=True):
                talk.heard(answer)
            served += answers
    check(oracle, served)


def test_of_a_prompt_that_decode_has_full_layers_send_no_row(pair, stages, oracle):
    prompt = random.Random("whole").choices(range(3, VOCABULARY), k=4 * PAGE)
    (first,) = ask(pair, prompt)
    lacking = stages.plan.payload_bytes(len(prompt)) - stages.plan.reused_bytes(len(prompt))  # rows of cut layers
    (again,), (payload, reused, _) = measured(pair, lambda: ask(pair, prompt))
    assert (payload, reused) == (lacking, len(prompt))
    samples, (payload, reused, _) = measured(pair, lambda: ask(pair, prompt, n=3), requests=3)
    assert (payload, reused, len(samples)) == (3 * lacking, 3 * len(prompt), 3)
    check(oracle, [first, again, *samples])


@CUT_ALONE
@pytest.mark.parametrize("events", [0, 3])
def test_a_turn_goes_on_after_one_that_was_aborted(pair, oracle, events):
    talk = Conversation(f"aborted after {events}")
    (answer,) = ask(pair, talk.say())
    talk.heard(answer)
    hang_up(pair, talk.say(), events)
    (again,) = ask(pair, talk.say())
    check(oracle, [answer, again])


def held(pair):
    """Tokens in both workers' pools that belong to requests, and requests that transfer."""
    counts = []
    for worker in pair.workers:
        (load,) = httpx.get(f"{worker.spec.url}/v1/loads", timeout=60).json()["loads"]
        counts += load["num_used_tokens"], total(scrape(worker.metrics_url), "pdtrim_kv_open_requests")
    return counts


def aborted(pair):
    samples = scrape(pair.workers[0].metrics_url).get("pdtrim_kv_requests_total", ())
    return sum(sample.value for sample in samples if sample.labels["outcome"] == "aborted")


@CUT_ALONE
def test_a_client_that_leaves_in_the_middle_of_a_long_prefill_leaves_nothing_behind(pair, oracle):
    """SGLang's prefill hears of it two seconds later: it is slowed down, so most chunks are still to come then.

    On a busy machine it may be through before: then another prompt is sent.
    """
    talk = Conversation("left")
    (answer,) = ask(pair, talk.say())
    talk.heard(answer)
    for attempt in range(6):
        prompt = random.Random(f"long {attempt}").choices(range(3, VOCABULARY), k=13 * CHUNK)
        counted, whole, deadline = aborted(pair), transferred(pair), time.monotonic() + 120
        with slowed(scheduler(pair.workers[0].pid), 25):
            with contextlib.suppress(httpx.ReadTimeout):
                httpx.post(f"{pair.url}/generate", json=body_of(prompt) | {"stream": True}, timeout=1)
            while aborted(pair) == counted and transferred(pair) == whole and time.monotonic() < deadline:
                time.sleep(0.1)
        if transferred(pair) == whole:
            break
    assert (aborted(pair) - counted, transferred(pair) - whole) == (1, 0)
    deadline = time.monotonic() + 120
    while any(held(pair)):
        assert time.monotonic() < deadline, held(pair)
        time.sleep(0.1)
    (again,) = ask(pair, talk.say())
    (late,) = ask(pair, prompt)
    check(oracle, [answer, again, late])


@CUT_ALONE
def test_evicted_rows_are_sent_again(pair, stages, oracle):
    talk = Conversation("evicted")
    (answer,) = ask(pair, talk.say())
    talk.heard(answer)
    for number in range(4):
        ask(pair, random.Random(f"other {number}").choices(range(3, VOCABULARY), k=POOL // 3))
    prompt = talk.say()
    (again,), (payload, reused, _) = measured(pair, lambda: ask(pair, prompt))
    assert (payload, reused) == (stages.plan.payload_bytes(len(prompt)), 0)
    check(oracle, [answer, again])


@CUT_ALONE
def test_decode_restarted_has_nothing_and_is_sent_all(pair, stages, oracle):
    talk = Conversation("restarted")
    (answer,) = ask(pair, talk.say())
    talk.heard(answer)
    pair.restart("decode-0")
    deadline = time.monotonic() + 120
    while httpx.post(f"{pair.url}/generate", json=body_of([5, 6, 7]), timeout=120).status_code == 503:
        assert time.monotonic() < deadline, "the router does not find the worker again"
        time.sleep(1)
    prompt = talk.say()
    (again,), (payload, reused, _) = measured(pair, lambda: ask(pair, prompt))
    assert (payload, reused) == (stages.plan.payload_bytes(len(prompt)), 0)
    check(oracle, [answer, again])
