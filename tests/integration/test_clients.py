"""What ordinary clients send to a served pair: bounds of the context and of the pool, token ids, echo, streams, EOS."""

from dataclasses import replace

import httpx
import pytest
import torch
from clientpair import ClientPair, client_oracle, client_stages, exactly

from pdtrim_deploy.models.loading import load_tokenizer
from pdtrim_deploy.serving import ServeEnvironment, commands
from pdtrim_deploy.serving.ports import free_ports
from pdtrim_deploy.serving.probe import complaint
from pdtrim_deploy.serving.process import ServerProcess

pytestmark = [pytest.mark.serve, pytest.mark.timeout(900)]
EOS = 2
PAGE = 4
TEXTS = ["안녕하세요, 반갑습니다.", "👩‍👩‍👧‍👦 👍🏽 🇰🇷 é", "한👍abcabcabd끝"]
BOUNDS = {"context of 128": (128, 1024), "pool of 640": (1024, 640)}  # of the model's context, and of the KV pool
COMPLETION = {"model": "pdtrim", "temperature": 0, "max_tokens": 96}


@pytest.fixture(scope="module", params=BOUNDS.values(), ids=BOUNDS)
def bounded(request, tiny_model, tmp_path_factory, real_cache, serving):
    """A pair whose prompts are bounded by the model's context, then one by the KV pool; its cluster beside it."""
    context, pool = request.param
    folder = tmp_path_factory.mktemp("clients")
    model = tiny_model(folder / "model", "Qwen3ForCausalLM", max_position_embeddings=context)
    plan = client_stages(model, folder, real_cache)
    options = {"page_size": PAGE, "chunked_prefill_size": 64, "max_total_tokens": pool, "threads": 1}
    options["extra_args"] = ("--enable-return-hidden-states",)
    with serving(folder / "prefill", folder / "decode", dtype="float32", **options) as cluster:
        yield ClientPair(cluster.url, client_oracle(folder, plan), load_tokenizer(folder / "prefill")), cluster


@pytest.fixture
def pair(bounded):
    return bounded[0]


@pytest.fixture
def bound(request):
    """The tokens that prompt and answer may have at most."""
    return min(request.node.callspec.params["bounded"])


@pytest.fixture(scope="module")
def whole_bodies(bounded, tmp_path_factory):
    """The same workers behind SGLang's mini_lb, which passes bodies on as they are."""
    _, cluster = bounded
    port, unused = free_ports(2)
    router = replace(cluster.spec.router, port=port, metrics_port=unused, extra_args=("--mini-lb",))
    folder, python = tmp_path_factory.mktemp("mini_lb"), ServeEnvironment.find().python
    command = commands.router_command(python, replace(cluster.spec, router=router))
    process = ServerProcess("mini_lb", command, commands.router_environment(python, folder), folder / "log")
    try:
        while complaint(router.url, 10.0) is not None:
            assert process.exit_code() is None, process.obituary()
        yield replace(bounded[0], url=router.url)
    finally:
        process.finish(0.0)


# For what does not depend on the bound.
one_pair = pytest.mark.parametrize("bounded", [BOUNDS["context of 128"]], indirect=True, ids=["context of 128"])


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_prompts_about_the_bound_get_the_oracles_text_or_a_4xx(pair, bound, stream):
    """Bound - 8 to bound + 1 tokens: SGLang keeps some tokens of a pool for itself."""
    statuses = {}
    for length in range(bound - 8, bound + 2):
        prompt = torch.randint(3, 259, (length,), generator=torch.Generator().manual_seed(length)).tolist()
        sampling = {"max_new_tokens": max(1, min(3, bound - length)), "temperature": 0, "ignore_eos": True}
        body = {"input_ids": prompt, "sampling_params": sampling, "return_logprob": True}
        statuses[length], scored = generate(pair, body, stream)
        if statuses[length] == 200:
            assert 1 <= len(scored) <= sampling["max_new_tokens"]
            assert pair.off(prompt, scored) <= 1e-3
        else:
            assert 400 <= statuses[length] < 500, (length, statuses[length])
    assert statuses[bound - 8] == 200
    assert statuses[bound + 1] != 200
    short = {"input_ids": [40, 41], "sampling_params": {"max_new_tokens": 2}}
    assert pair.post("generate", short).status_code == 200


def generate(pair, body, stream):
    """Status and (logprob, token, ...) of each new token; an error inside a stream is its status."""
    if not stream:
        reply = pair.post("generate", body)
        return reply.status_code, reply.json()["meta_info"]["output_token_logprobs"] if reply.is_success else []
    with httpx.stream("POST", f"{pair.url}/generate", json=body | {"stream": True}, timeout=120) as reply:
        lines = [line for line in reply.iter_lines() if line.startswith("data: {")]
        if reply.status_code != 200:
            return reply.status_code, []
    last = httpx.Response(200, text=lines[-1][6:]).json()
    if "error" in last:
        return int(last["error"]["code"]), []
    reason = last["meta_info"]["finish_reason"]
    return (reason.get("status_code") or 200), last["meta_info"]["output_token_logprobs"]


def test_more_new_tokens_than_there_is_room_for_are_cut_or_refused(pair, bound):
    """The end of the text is the bound's, never another text's."""
    prompt = [40 + at % 200 for at in range(bound - 28)]
    sampling = {"max_new_tokens": 60, "temperature": 0, "ignore_eos": True}
    reply = pair.post("generate", {"input_ids": prompt, "sampling_params": sampling, "return_logprob": True})
    if reply.status_code == 200:
        scored = reply.json()["meta_info"]["output_token_logprobs"]
        assert len(prompt) + len(scored) <= bound
        assert pair.off(prompt, scored) <= 1e-3
    else:
        assert 400 <= reply.status_code < 500, reply.text


@one_pair
def test_a_first_token_that_ends_the_text(pair):
    """Prefill computes it; decode has nothing to do, and says so at once."""
    prompts = torch.randint(3, 259, (6000, 6), generator=torch.Generator().manual_seed(1))
    firsts = pair.oracle.prefill(prompts).logits.argmax(-1)
    ending = prompts[firsts == EOS][:3].tolist()
    assert ending, "no prompt of these ends at once"
    for prompt in ending:
        sampling = {"max_new_tokens": 8, "temperature": 0}
        body = {"input_ids": prompt, "sampling_params": sampling, "return_logprob": True}
        for stream in (False, True):
            status, scored = generate(pair, body, stream)
            assert (status, [token for _, token, *_ in scored]) == (200, [EOS])
        answer = pair.post("generate", body).json()
        assert answer["text"] == ""
        assert answer["meta_info"]["finish_reason"] == {"type": "stop", "matched": EOS}


@one_pair
@pytest.mark.parametrize("text", TEXTS)
def test_joined_deltas_are_the_whole_text_in_every_script(pair, text):
    """A character has up to four tokens here, an emoji up to 25."""
    body = COMPLETION | {"prompt": "say it: "} | exactly(text)
    whole = pair.post("v1/completions", body).json()["choices"][0]
    assert whole["text"] == text
    assert pair.streamed("v1/completions", body) == (text, "stop")


@one_pair
@pytest.mark.parametrize(
    ("stop", "left"), [("abd", "한👍abcabc"), ("cab", "한👍ab"), ("👍", "한"), ("bd끝", "한👍abcabca")]
)
def test_a_stop_string_inside_a_run_of_characters(pair, stop, left):
    """Tokens that begin like it are held back from a stream until it is clear that they are text."""
    body = COMPLETION | {"prompt": "say it: ", "stop": stop} | exactly(TEXTS[2])
    whole = pair.post("v1/completions", body).json()["choices"][0]
    assert (whole["text"], whole["finish_reason"], whole["matched_stop"]) == (left, "stop", stop)
    assert pair.streamed("v1/completions", body) == (left, "stop")


@one_pair
def test_joined_deltas_are_the_whole_text_of_bytes_that_are_no_characters(pair):
    """What a random model says is mostly no UTF-8 at all."""
    for seed in range(6):
        prompt = "".join(chr(97 + (seed * 7 + i * i) % 26) for i in range(20 + seed))
        body = COMPLETION | {"prompt": prompt, "max_tokens": 24}
        whole = pair.post("v1/completions", body).json()["choices"][0]["text"]
        assert pair.streamed("v1/completions", body)[0] == whole


@one_pair
def test_an_echo_with_logprobs_is_refused_and_each_alone_is_not(pair):
    body = COMPLETION | {"prompt": "hello", "max_tokens": 2}
    for logprobs in (0, 1):
        reply = pair.post("v1/completions", body | {"echo": True, "logprobs": logprobs})
        assert (reply.status_code, "echo with logprobs is not supported" in reply.text) == (400, True)
    echo = pair.post("v1/completions", body | {"echo": True}).json()["choices"][0]
    assert echo["text"].startswith("hello")
    scored = pair.post("v1/completions", body | {"logprobs": 1}).json()["choices"][0]
    assert len(scored["logprobs"]["token_logprobs"]) == 2


@one_pair
def test_prompts_as_token_ids_behind_mini_lb(pair, whole_bodies):
    """The answers are those to the same text, which SGLang's Rust router takes too."""
    texts = ["hello world", "another prompt"]
    ids = [pair.tokenizer(text)["input_ids"] for text in texts]
    body = COMPLETION | {"max_tokens": 6, "ignore_eos": True}
    right = [choice["text"] for choice in pair.post("v1/completions", body | {"prompt": texts}).json()["choices"]]
    assert right[0] != right[1]
    single = whole_bodies.post("v1/completions", body | {"prompt": ids[0]})
    assert [choice["text"] for choice in single.json()["choices"]] == right[:1]
    both = whole_bodies.post("v1/completions", body | {"prompt": ids})
    assert [choice["text"] for choice in both.json()["choices"]] == right
    assert whole_bodies.streamed("v1/completions", body | {"prompt": ids[1]})[0] == right[1]
    assert whole_bodies.post("v1/completions", body | {"prompt": [5, 512]}).status_code == 400
    assert pair.post("v1/completions", body | {"prompt": ids[0]}).status_code == 422, "the Rust router takes ids now"


@one_pair
def test_a_model_that_is_not_served_is_not_found(pair):
    assert httpx.get(f"{pair.url}/v1/models", timeout=120).json()["data"][0]["id"] == "pdtrim"
    assert httpx.get(f"{pair.url}/v1/models/no-such-model", timeout=120).status_code == 404


@one_pair
def test_hidden_states_are_those_of_decodes_tokens(pair):
    """None belongs to the first token, which prefill draws; the head of decode's model draws the others from them."""
    sampling = {"max_new_tokens": 4, "temperature": 0, "ignore_eos": True}
    body = {"input_ids": list(range(40, 60)), "sampling_params": sampling, "return_hidden_states": True}
    answer = pair.post("generate", body).json()
    states = torch.tensor(answer["meta_info"]["hidden_states"])
    drawn = pair.oracle.decode_model.lm_head(states).argmax(-1).tolist()
    assert drawn == answer["output_ids"][1:]
