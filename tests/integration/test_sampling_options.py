"""What a client asks of sampling holds across the two workers: prefill draws the first token, decode the others.

Tokens of a request with penalties or a bias are held against the PD oracle's logprobs, changed alike.
"""

import json

import httpx
import pytest
import torch

from pdtrim_deploy.models.loading import load_model
from pdtrim_deploy.models.oracle import PDOracle

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
    folders = (mixed_bundle.prefill_dir, mixed_bundle.decode_dir)
    return PDOracle(*(load_model(folder, "float32") for folder in folders), mixed_bundle.plan)


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


@pytest.mark.parametrize("penalty", ["frequency_penalty", "presence_penalty"])
def test_decodes_first_token_is_penalised_for_prefills(mixed_pair, repeatable, penalty):
    """A negative penalty draws it again. Later tokens tell nothing: SGLang's scheduler counts some a step late."""
    first, second = tokens_of(generate(mixed_pair, repeatable, max_new_tokens=2)).tolist()
    assert second != first
    assert tokens_of(generate(mixed_pair, repeatable, max_new_tokens=2, **{penalty: -2.0})).tolist() == [first, first]


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


def test_a_stop_token_ends_where_it_may(mixed_pair):
    plain = tokens_of(generate(mixed_pair)).tolist()
    for at in (0, 4):  # prefill's token, and one of decode's
        answer = generate(mixed_pair, ignore_eos=False, stop_token_ids=[plain[at]])
        assert tokens_of(answer).tolist() == plain[: plain.index(plain[at]) + 1]
        assert answer["meta_info"]["finish_reason"] == {"type": "stop", "matched": plain[at]}
    least = generate(mixed_pair, ignore_eos=False, stop_token_ids=plain[:3], min_new_tokens=6)
    assert len(tokens_of(least)) >= 6
    assert not set(tokens_of(least)[:5].tolist()) & set(plain[:3])


@pytest.mark.parametrize("path", ["completions", "chat/completions"])
def test_a_grammar_goes_on_where_prefill_left_it(mixed_pair, path):
    prompt = {"prompt": "Give a"} if path == "completions" else {"messages": [{"role": "user", "content": "Give a"}]}
    grammar = {"ebnf": 'root ::= "{" "\\"a\\": " ("1" | "22") "}"'}
    body = {"model": "pdtrim", "max_tokens": 40, "temperature": 0} | prompt | grammar
    (choice,) = httpx.post(f"{mixed_pair.url}/v1/{path}", json=body, timeout=120).json()["choices"]
    text = choice["message"]["content"] if "message" in choice else choice["text"]
    assert json.loads(text)["a"] in (1, 22)
    assert choice["finish_reason"] == "stop"


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
    assert tokens_of(generate(mixed_pair)).tolist() == plain
