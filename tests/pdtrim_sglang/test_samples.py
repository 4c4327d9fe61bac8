"""Each of a prompt's n samples is a request with a room of its own, the same on both workers."""

import asyncio
from types import SimpleNamespace

import pytest

pytest.importorskip("sglang", reason="needs the serve environment")
from hypothesis import given
from hypothesis import strategies as st
from pdtrim_sglang import hook_targets, sglang_host
from pdtrim_sglang.patches import front_end
from pdtrim_sglang.samples import ROOMS, sample_room
from sglang.srt.managers.io_struct import GenerateReqInput
from sglang.srt.managers.tokenizer_manager import TokenizerManager
from sglang.srt.plugins import load_plugins
from sglang.srt.plugins.hook_registry import HookRegistry

load_plugins()
ROOM = {"bootstrap_host": "h", "bootstrap_port": 7}
N3 = {"n": 3, "temperature": 1.0}


@pytest.fixture(autouse=True)
def backend(monkeypatch):
    arguments = SimpleNamespace(disaggregation_transfer_backend="pdtrim_tcp")
    monkeypatch.setattr(sglang_host, "server_arguments", lambda: arguments)
    return arguments


def normalised(**body):
    request = GenerateReqInput(**body)
    request.normalize_batch_and_arguments()
    return request


def requests(request):
    return [request[i] for i in range(request.batch_size)]


@pytest.mark.parametrize(
    ("body", "prompts", "rooms"),
    [
        ({"text": "a", "bootstrap_room": 5}, ["a"] * 3, [5]),
        ({"text": ["a", "b"], "bootstrap_room": [5, 9]}, ["a"] * 3 + ["b"] * 3, [5, 9]),
        ({"text": ["a", "b"], "bootstrap_room": 5}, ["a"] * 3 + ["b"] * 3, [5, 6]),
        ({"text": "a", "bootstrap_room": [5, 9, 11]}, ["a"] * 3, [5]),  # the router's, of a chat with n = 3
    ],
)
def test_samples_stand_prompt_by_prompt_each_in_its_own_room(body, prompts, rooms):
    sides = [normalised(sampling_params=N3, **ROOM, **body) for _ in ("prefill", "decode")]
    first, second = ([sample.bootstrap_room for sample in requests(side)] for side in sides)
    assert first == second
    assert len(set(first)) == len(prompts)
    assert first[::3] == rooms
    assert all(0 <= room < ROOMS for room in first)
    for sample, prompt in zip(requests(sides[0]), prompts, strict=True):
        assert (sample.text, sample.bootstrap_host, sample.bootstrap_port) == (prompt, "h", 7)
        assert sample.sampling_params == {"n": 1, "temperature": 1.0}
    ids = [sample.rid for sample in requests(sides[0])]
    assert ids == sides[0].rid
    assert len(set(ids)) == len(prompts)


def test_what_the_client_gives_prompt_by_prompt_stays_with_its_prompt():
    batch = normalised(
        input_ids=[[1, 2], [3]], rid=["x", "y"], bootstrap_room=[5, 9], extra_key=["k", "l"],
        sampling_params=[{"n": 2, "top_k": 4}, {"n": 2, "top_k": 8}],
    )  # fmt: skip
    assert batch.rid == ["x_0", "x_1", "y_0", "y_1"]
    assert [request.input_ids for request in requests(batch)] == [[1, 2], [1, 2], [3], [3]]
    assert [request.extra_key for request in requests(batch)] == ["k", "k", "l", "l"]
    assert [request.sampling_params["top_k"] for request in requests(batch)] == [4, 4, 8, 8]


@pytest.mark.parametrize(
    ("body", "transfer"),
    [
        ({"text": ["a", "b"], "bootstrap_room": [5, 9], "sampling_params": {"n": 1}}, "pdtrim_tcp"),
        ({"text": "a", "bootstrap_room": 5}, "pdtrim_tcp"),
        ({"text": "a", "sampling_params": N3}, "pdtrim_tcp"),  # without a room: past the router
        ({"text": "a", "bootstrap_room": 5, "sampling_params": N3}, "mooncake"),
    ],
)
def test_all_else_is_sglangs(backend, body, transfer):
    backend.disaggregation_transfer_backend = transfer
    ours, stock = normalised(rid="r", **body), GenerateReqInput(rid="r", **body)
    GenerateReqInput.normalize_batch_and_arguments.__wrapped__(stock)
    assert ours == stock


@pytest.mark.parametrize("samples", [0, -2])
def test_fewer_than_one_sample_is_the_clients_fault(samples):
    with pytest.raises(ValueError, match=f"n is {samples}: ask for one sample at least"):
        normalised(text="a", bootstrap_room=5, sampling_params={"n": samples})


@given(st.integers(0, ROOMS - 1), st.integers(0, 10_000), st.integers(0, 10_000), st.integers(-512, 512))
def test_no_two_samples_meet_not_of_neighbouring_rooms_either(room, sample, other, apart):
    if (apart, sample) != (0, other):
        assert sample_room(room, sample) != sample_room((room + apart) % ROOMS, other)


@pytest.mark.parametrize("samples", [1, 2, 4])
def test_sglang_sends_one_request_a_sample_and_none_before_them(samples):
    """Its own prefix-caching request would wait on one side for a room of which the other knows nothing."""
    sent = []
    manager = object.__new__(TokenizerManager)
    manager.rid_to_state = {}

    async def tokenize(request):
        return request

    async def send(request):
        sent.append(request)

    async def respond(request, _):
        yield {"text": request.rid}

    manager._tokenize_one_request, manager._send_one_request, manager._wait_one_response = tokenize, send, respond
    manager._should_use_batch_tokenization = lambda *_: False
    request = normalised(text=["a", "b"], bootstrap_room=[5, 9], sampling_params={"n": samples, "max_new_tokens": 6})
    manager.rid_to_state = {rid: SimpleNamespace() for rid in request.rid}

    async def answer():
        return [reply async for reply in manager._handle_batch_request(request, None, {})]

    (replies,) = asyncio.run(answer())
    assert [reply["text"] for reply in replies] == [sample.rid for sample in sent]
    assert [sample.text for sample in sent] == ["a"] * samples + ["b"] * samples
    assert len({sample.bootstrap_room for sample in sent}) == 2 * samples
    assert all(sample.sampling_params["max_new_tokens"] == 6 for sample in sent)


def test_the_front_end_does_not_start_without_its_hook(backend, monkeypatch):
    """It runs in another process than the scheduler: hooks are applied, or not, in each."""
    monkeypatch.setattr(HookRegistry, "_patched", HookRegistry._patched - {hook_targets.NORMALISE})
    backend.disaggregation_transfer_backend = "mooncake"
    front_end.check_front_end(None, None)
    backend.disaggregation_transfer_backend = "pdtrim_tcp"
    with pytest.raises(RuntimeError, match=r"did not take the hooks .*normalize_batch_and_arguments"):
        front_end.check_front_end(None, None)
