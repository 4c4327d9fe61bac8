"""What a client asks of sampling holds across the two workers: prefill draws the first token, decode the others.

Tokens of a request with penalties or a bias are held against the PD oracle's logprobs, changed alike.
"""

import json
import re

import httpx
import pytest
import torch

from pdtrim_deploy.evaluation.bundle_oracle import oracle_of
from pdtrim_deploy.models.layer_kv import LayerKV

pytestmark = [
    pytest.mark.serve,
    pytest.mark.model,
    pytest.mark.timeout(600),
    pytest.mark.xdist_group("tiny bundle"),
]
PROMPT = list(range(40, 140))
NEW = 12
TOLERANCE = 1e-3  # nats, float32


@pytest.fixture(scope="module")
def oracle(mixed_bundle):
    return oracle_of(mixed_bundle, lambda _: None, None)


def generate(pair, prompt=PROMPT, **sampling):
    """The answer to `prompt`, with logprobs, at temperature 0 unless `sampling` says otherwise."""
    sampling = {"max_new_tokens": NEW, "temperature": 0, "ignore_eos": True} | sampling
    body = {"input_ids": prompt, "sampling_params": sampling, "return_logprob": True}
    response = httpx.post(f"{pair.url}/generate", json=body, timeout=120)
    assert response.status_code == 200, response.text
    return response.json()


def tokens_of(answer):
    return torch.tensor([token for _, token, *_ in answer["meta_info"]["output_token_logprobs"]])


def oracle_logprobs(oracle, tokens, prompt=PROMPT):
    """float32 `[len(tokens), vocabulary]` after `prompt`."""
    size = oracle.decode_model.config.vocab_size
    ids, ranked = oracle.top_logprobs(torch.tensor(prompt), tokens, size)
    return torch.empty_like(ranked).scatter(1, ids, ranked)


def short_of_the_best(logprobs, tokens):
    """How far each token lies below the likeliest at its place, in nats."""
    return logprobs.max(1).values - logprobs.gather(1, tokens[:, None])[:, 0]


@pytest.fixture(scope="module")
def repeatable(oracle):
    """A prompt after which a bonus of 2 nats, and none of 0.1, draws the first token a second time."""
    for start in range(40, 400):
        prompt = list(range(start, start + 60))
        tokens = oracle.greedy(torch.tensor(prompt), 1).repeat(2)
        if 0.1 < short_of_the_best(oracle_logprobs(oracle, tokens, prompt), tokens)[1] < 1.9:
            return prompt
    raise AssertionError("no such prompt")


@pytest.mark.parametrize(
    ("penalty", "value"), [("frequency_penalty", -2.0), ("presence_penalty", -2.0), ("repetition_penalty", 0.01)]
)
def test_decodes_first_token_is_penalised_for_prefills(mixed_pair, repeatable, penalty, value):
    """A penalty that favours draws it again. Later tokens tell nothing: SGLang's scheduler counts some a step late."""
    first, second = tokens_of(generate(mixed_pair, repeatable, max_new_tokens=2)).tolist()
    assert second != first
    assert tokens_of(generate(mixed_pair, repeatable, max_new_tokens=2, **{penalty: value})).tolist() == [first, first]


def test_a_bias_holds_on_both_workers(mixed_pair):
    body = {"model": "pdtrim", "prompt": "Give", "max_tokens": NEW, "temperature": 0, "logit_bias": {"77": 100.0}}
    (choice,) = httpx.post(f"{mixed_pair.url}/v1/completions", json=body, timeout=120).json()["choices"]
    assert len(choice["text"]) == NEW
    assert len(set(choice["text"])) == 1


def test_the_router_drops_some_fields_of_generate(mixed_pair):
    """docs/how-to/clients.md names them: when this fails, the router takes them, and the page is to say so."""
    plain = tokens_of(generate(mixed_pair)).tolist()
    assert tokens_of(generate(mixed_pair, logit_bias={"77": 100.0}, stop_regex=".")).tolist() == plain


def test_top_k_draws_from_the_oracles_likeliest(mixed_pair, oracle):
    for _ in range(3):
        tokens = tokens_of(generate(mixed_pair, temperature=2.0, top_k=3))
        logprobs = oracle_logprobs(oracle, tokens)
        third = logprobs.topk(3).values[:, -1]
        assert (third - logprobs.gather(1, tokens[:, None])[:, 0]).max() < TOLERANCE
        assert short_of_the_best(logprobs, tokens).max() > TOLERANCE, "nothing was drawn"


@pytest.mark.parametrize("option", [{"top_p": 0.3}, {"min_p": 0.6}], ids=lambda option: next(iter(option)))
def test_likely_tokens_alone_are_drawn(mixed_pair, oracle, option):
    """At temperature 3 others would be: the draws of both workers are held against the oracle's probabilities."""
    for _ in range(3):
        tokens = tokens_of(generate(mixed_pair, temperature=3.0, **option))
        probabilities = (oracle_logprobs(oracle, tokens) / 3).softmax(1)
        drawn = probabilities.gather(1, tokens[:, None])
        if "top_p" in option:  # what lies before it in the order of probability
            assert ((probabilities * (probabilities > drawn)).sum(1) < option["top_p"] + TOLERANCE).all()
        else:
            assert (drawn[:, 0] > option["min_p"] * probabilities.max(1).values - TOLERANCE).all()
        assert short_of_the_best(oracle_logprobs(oracle, tokens), tokens).max() > TOLERANCE, "nothing was drawn"


def test_a_seed_is_taken_and_draws_as_without(mixed_pair):
    """SGLang draws by a request's seed with `--enable-deterministic-inference` alone, which no CPU backend has."""
    drawn = {tuple(tokens_of(generate(mixed_pair, temperature=3.0, sampling_seed=7)).tolist()) for _ in range(3)}
    assert len(drawn) == 3


def prompt_logits(oracle, ids):
    """Of every position, by prefill as the plan has it."""
    runs = oracle.prompt_runs([ids])
    while runs[-1].running:
        kv = LayerKV()
        for run in runs:
            run.advance([kv])
    return torch.cat([run.runner.logits(run.states[0]) for run in runs], 1)


def test_logprobs_of_a_prompt_are_prefills(mixed_pair, oracle):
    """Of all its tokens but the first, and of those behind `logprob_start_len` alone."""
    with torch.no_grad():
        logits = prompt_logits(oracle, torch.tensor([PROMPT]))[0]
    expected = logits.log_softmax(1)[:-1].gather(1, torch.tensor(PROMPT[1:])[:, None])[:, 0]
    for start in (0, 70):
        body = {"input_ids": PROMPT, "sampling_params": {"max_new_tokens": 2}, "return_logprob": True}
        body["logprob_start_len"] = start
        answer = httpx.post(f"{mixed_pair.url}/generate", json=body, timeout=120).json()
        (first, token, *_), *rows = answer["meta_info"]["input_token_logprobs"]
        assert (first, token) == (None, PROMPT[start])
        assert [token for _, token, *_ in rows] == PROMPT[start + 1 :]
        scored = torch.tensor([logprob for logprob, *_ in rows])
        assert (scored - expected[start:]).abs().max() < TOLERANCE


def test_top_logprobs_are_the_oracles_on_both_workers(mixed_pair, oracle):
    """Prefill's for the first token, decode's for the others; OpenAI's forms have as many."""
    sampling = {"max_new_tokens": NEW, "temperature": 0, "ignore_eos": True}
    body = {"input_ids": PROMPT, "sampling_params": sampling, "return_logprob": True, "top_logprobs_num": 5}
    answer = httpx.post(f"{mixed_pair.url}/generate", json=body, timeout=120).json()
    served = torch.tensor([[row[0] for row in rows] for rows in answer["meta_info"]["output_top_logprobs"]])
    _, ranked = oracle.top_logprobs(torch.tensor(PROMPT), tokens_of(answer), 5)
    assert served.shape == (NEW, 5)
    assert (served - ranked).abs().max() < TOLERANCE
    options = {"logprobs": True, "top_logprobs": 3, "max_tokens": NEW, "ignore_eos": True}
    (choice,) = chat(mixed_pair, [{"role": "user", "content": "Give a"}], **options).json()["choices"]
    tokens = choice["logprobs"]["content"]
    assert [len(token["top_logprobs"]) for token in tokens] == [3] * NEW
    assert all(token["logprob"] == token["top_logprobs"][0]["logprob"] for token in tokens)


@pytest.mark.parametrize("path", ["completions", "chat/completions"])
def test_a_stream_ends_with_the_usage_of_both_workers(mixed_pair, path):
    prompt = {"prompt": "Give"} if path == "completions" else {"messages": [{"role": "user", "content": "Give"}]}
    body = {"model": "pdtrim", "max_tokens": NEW, "temperature": 0, "ignore_eos": True} | prompt
    plain = httpx.post(f"{mixed_pair.url}/v1/{path}", json=body, timeout=120).json()["usage"]
    assert plain["completion_tokens"] == NEW
    streamed = body | {"stream": True, "stream_options": {"include_usage": True}}
    with httpx.stream("POST", f"{mixed_pair.url}/v1/{path}", json=streamed, timeout=120) as reply:
        *_, last, done = (line for line in reply.iter_lines() if line.startswith("data:"))
    event = json.loads(last.removeprefix("data:"))
    assert (event["choices"], done) == ([], "data: [DONE]")
    names = ("prompt_tokens", "completion_tokens", "total_tokens")
    assert [event["usage"][name] for name in names] == [plain[name] for name in names]


def test_a_stop_token_ends_where_it_may(mixed_pair):
    plain = tokens_of(generate(mixed_pair)).tolist()
    for at in (0, 4):  # prefill's token, and one of decode's
        answer = generate(mixed_pair, ignore_eos=False, stop_token_ids=[plain[at]])
        assert tokens_of(answer).tolist() == plain[: plain.index(plain[at]) + 1]
        assert answer["meta_info"]["finish_reason"] == {"type": "stop", "matched": plain[at]}
    least = generate(mixed_pair, ignore_eos=False, stop_token_ids=plain[:3], min_new_tokens=6)
    assert len(tokens_of(least)) >= 6
    assert not set(tokens_of(least)[:5].tolist()) & set(plain[:3])


WORDS = {"enum": ["ab", "cd"]}
SEQUENCE = [
    {"type": "const_string", "value": "<f>"},
    {"type": "json_schema", "json_schema": WORDS},
    {"type": "const_string", "value": "</f>"},
]
TAGGED = {"type": "structural_tag", "format": {"type": "sequence", "elements": SEQUENCE}}
GRAMMARS = [  # path, fields that ask for a grammar, what the text must be
    ("v1/completions", {"ebnf": 'root ::= "{" "\\"a\\": " ("1" | "22") "}"'}, r'\{"a": (1|22)}'),
    ("v1/chat/completions", {"ebnf": 'root ::= "{" "\\"a\\": " ("1" | "22") "}"'}, r'\{"a": (1|22)}'),
    ("v1/completions", {"regex": "[b-d]{5}x"}, "[b-d]{5}x"),
    ("v1/chat/completions", {"regex": "[b-d]{5}x"}, "[b-d]{5}x"),
    ("generate", {"regex": "[b-d]{5}x"}, "[b-d]{5}x"),
    ("generate", {"json_schema": json.dumps(WORDS)}, '"(ab|cd)"'),
    ("v1/completions", {"json_schema": json.dumps(WORDS)}, '"(ab|cd)"'),
    (
        "v1/chat/completions",
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": WORDS}}},
        '"(ab|cd)"',
    ),
    ("v1/completions", {"response_format": TAGGED}, '<f>"(ab|cd)"</f>'),
]


@pytest.mark.parametrize(("path", "grammar", "form"), GRAMMARS)
def test_a_grammar_goes_on_where_prefill_left_it(mixed_pair, path, grammar, form):
    if path == "generate":
        body = {"text": "Give a", "sampling_params": {"max_new_tokens": 40, "temperature": 0} | grammar}
    else:
        prompt = {"messages": [{"role": "user", "content": "Give a"}]} if "chat" in path else {"prompt": "Give a"}
        body = {"model": "pdtrim", "max_tokens": 40, "temperature": 0} | prompt | grammar
    response = httpx.post(f"{mixed_pair.url}/{path}", json=body, timeout=120)
    assert response.status_code == 200, response.text
    answer = response.json()
    (choice,) = answer.get("choices", [answer])
    text = choice["message"]["content"] if "message" in choice else choice["text"]
    assert re.fullmatch(form, text)
    reason = choice["finish_reason"] if path != "generate" else choice["meta_info"]["finish_reason"]["type"]
    assert reason == "stop"


def test_a_stop_string_may_begin_with_prefills_token(mixed_pair):
    for stop, left in (("ab", ""), ("cd", "ab")):
        body = {"model": "pdtrim", "prompt": "Give", "temperature": 0, "regex": "abcdef", "stop": stop}
        (choice,) = httpx.post(f"{mixed_pair.url}/v1/completions", json=body, timeout=120).json()["choices"]
        assert (choice["text"], choice["finish_reason"], choice["matched_stop"]) == (left, "stop", stop)


@pytest.mark.parametrize(
    "format",
    [
        {"type": "json_object"},
        {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object", "maxProperties": 1}}},
    ],
    ids=lambda format: format["type"],
)
def test_a_response_format_begins_an_object(mixed_pair, format):
    """A random model writes white space for ever, which JSON allows: only that it keeps to the grammar can be seen."""
    messages = [{"role": "user", "content": "Give a"}]
    body = {"model": "pdtrim", "max_tokens": 24, "temperature": 0, "messages": messages, "response_format": format}
    (choice,) = httpx.post(f"{mixed_pair.url}/v1/chat/completions", json=body, timeout=120).json()["choices"]
    text = choice["message"]["content"].strip()
    assert text.startswith("{")
    assert text[1:].strip()[:1] in ("", '"', "}")


def test_a_priority_changes_nothing_where_the_workers_do_not_schedule_by_it(mixed_pair):
    """With `--enable-priority-scheduling`: test_retraction.py."""
    sampling = {"max_new_tokens": NEW, "temperature": 0, "ignore_eos": True}
    body = {"input_ids": PROMPT, "sampling_params": sampling, "priority": 1}
    response = httpx.post(f"{mixed_pair.url}/generate", json=body, timeout=120)
    assert response.json()["output_ids"] == tokens_of(generate(mixed_pair)).tolist()


TOOL = {"name": "look_up", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}
TOOLS = [{"type": "function", "function": TOOL}]


def chat(pair, content, **options):
    body = {"model": "pdtrim", "messages": content, "max_tokens": 60, "temperature": 0} | options
    return httpx.post(f"{pair.url}/v1/chat/completions", json=body, timeout=120)


def test_a_tool_that_is_required_is_called_by_both_workers_tokens(mixed_pair):
    """SGLang asks for a list of calls; a random model writes white space where JSON allows it."""
    messages = [{"role": "user", "content": "Give a"}]
    (choice,) = chat(mixed_pair, messages, tools=TOOLS, tool_choice="required").json()["choices"]
    message = choice["message"]
    text = "".join((message["content"] or json.dumps(message["tool_calls"])).split())
    start = '[{"name"'
    assert text
    assert text.startswith(start) or start.startswith(text)
    assert chat(mixed_pair, messages, tools=TOOLS).json()["choices"][0]["message"]["content"].strip()[:1] != "["


def test_what_a_text_model_cannot_do_is_a_4xx_and_the_next_request_is_served(mixed_pair):
    plain = tokens_of(generate(mixed_pair)).tolist()
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}}
    refused = chat(mixed_pair, [{"role": "user", "content": [image]}])
    assert (refused.status_code, "only supports text" in refused.text) == (400, True)
    fields = {
        "custom_logit_processor": '{"callable": "8004"}',
        "return_hidden_states": True,
        "session_params": {"id": "abc"},
    }
    for name, value in fields.items():
        body = {"input_ids": PROMPT, "sampling_params": {"max_new_tokens": 2}, name: value}
        assert httpx.post(f"{mixed_pair.url}/generate", json=body, timeout=120).status_code == 400, name
    assert httpx.post(f"{mixed_pair.url}/open_session", json={}, timeout=120).status_code == 404
    embedded = {"input_embeds": [[0.0] * 64] * 4, "sampling_params": {"max_new_tokens": NEW, "temperature": 0}}
    answers = [
        httpx.post(f"{mixed_pair.url}/generate", json=embedded | prompt, timeout=120)
        for prompt in ({}, {"input_ids": PROMPT, "return_logprob": True})
    ]
    assert 400 <= answers[0].status_code < 500
    assert tokens_of(answers[1].json()).tolist() == plain  # the router drops the field
    ignored = {"input_ids": PROMPT, "sampling_params": embedded["sampling_params"] | {"ignore_eos": True}}
    ignored["image_data"] = image["image_url"]["url"]
    assert httpx.post(f"{mixed_pair.url}/generate", json=ignored, timeout=120).json()["output_ids"] == plain
    assert tokens_of(generate(mixed_pair)).tolist() == plain
