"""Requests that would end a worker, or be answered by half, are refused in SGLang's own validation."""

from inspect import signature
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("sglang", reason="needs the serve environment")

from pdtrim_sglang.clients import MOST_TOP_LOGPROBS, bad_logprobs, bad_prompt, bad_room, bad_stop_regex, scored_echo


@pytest.mark.parametrize(
    ("ids", "says"),
    [([], "no tokens"), ([5, 512, 7], "prompt token 1 is 512; valid ids are 0 to 511"), ([-1], "prompt token 0 is -1")],
)
def test_prompts_without_an_embedding(ids, says):
    assert says in bad_prompt(ids, 512)


def test_ordinary_requests_pass():
    assert bad_prompt([0, 511], 512) is None
    assert bad_logprobs(-1, 0, 512) is bad_logprobs(7, 128, 512) is None
    assert bad_room(None) is bad_room(1) is bad_room((1 << 64) - 1) is None
    assert bad_stop_regex(None) is bad_stop_regex("a+") is bad_stop_regex(["a", "b?"]) is None
    assert scored_echo(True, None) is scored_echo(False, 0) is None


@pytest.mark.parametrize(("start", "alternatives"), [(-2, 0), (0, 129), (0, -1)])
def test_logprobs_out_of_range(start, alternatives):
    assert bad_logprobs(start, alternatives, 512)


@pytest.mark.parametrize("room", [-1, 1 << 64])
def test_rooms_that_workers_cannot_name(room):
    """SGLang's metadata row, and our message, hold no such number: each would end a scheduler."""
    assert f"bootstrap_room is {room}" in bad_room(room)


def test_a_room_that_sglangs_decode_takes_for_none_is_left_to_its_warm_up():
    """Decode would keep the request's slots until the client hangs up."""
    from sglang.srt.disaggregation.base.conn import KVPoll
    from sglang.srt.disaggregation.utils import FAKE_BOOTSTRAP_HOST, _apply_metadata_gate

    for host, waits in (("127.0.0.1", True), (FAKE_BOOTSTRAP_HOST, False)):
        request = SimpleNamespace(req=SimpleNamespace(bootstrap_host=host), metadata_buffer_index=0)
        polls = [int(KVPoll.Success)]
        _apply_metadata_gate(polls, [request], SimpleNamespace(bootstrap_room=torch.zeros(1, 8)))
        assert (polls == [int(KVPoll.Transferring)]) is waits
        assert (bad_room(0, host) is not None) is waits
    assert "bootstrap_room is 0; valid are 1 to" in bad_room(0)


def test_as_many_alternatives_as_sglangs_metadata_row_holds():
    from sglang.srt.disaggregation.utils import MetadataBuffers

    assert signature(MetadataBuffers).parameters["max_top_logprobs_num"].default == MOST_TOP_LOGPROBS


def test_sglang_refuses_what_we_say_is_wrong(monkeypatch):
    """The hooks raise ValueError, or return the sentence: SGLang answers 400 to both."""
    from pdtrim_sglang import sglang_host
    from pdtrim_sglang.patches import front_end
    from sglang.srt.managers.io_struct import GenerateReqInput

    monkeypatch.setattr(sglang_host, "server_arguments", lambda: SimpleNamespace(disaggregation_mode="decode"))
    manager = SimpleNamespace(model_config=SimpleNamespace(vocab_size=512), rid_to_state={})
    request = GenerateReqInput(input_ids=[5], sampling_params={}, top_logprobs_num=0, logprob_start_len=-1)
    front_end.refuse_request(lambda *arguments: None, manager, request, [5])
    with pytest.raises(ValueError, match="embeddings are not supported"):
        front_end.refuse_request(lambda *arguments: None, manager, request, None)
    with pytest.raises(ValueError, match="valid ids are"):
        front_end.refuse_request(lambda *arguments: None, manager, request, [512])
    request.top_logprobs_num = 129
    with pytest.raises(ValueError, match="129 top logprobs"):
        front_end.refuse_request(lambda *arguments: None, manager, request, [5])
    request.top_logprobs_num, request.sampling_params = 0, {"stop_regex": ["a+", "((("]}
    with pytest.raises(ValueError, match=r"'\(\(\(' is no regular expression"):
        front_end.refuse_request(lambda *arguments: None, manager, request, [5])
    request.sampling_params = {}
    for request.bootstrap_room in (-1, 0):
        with pytest.raises(ValueError, match=f"bootstrap_room is {request.bootstrap_room}"):
            front_end.refuse_request(lambda *arguments: None, manager, request, [5])
    request.bootstrap_host = "2.2.2.2"  # of SGLang's warm-up
    front_end.refuse_request(lambda *arguments: None, manager, request, [5])
    body = SimpleNamespace(echo=True, logprobs=1)
    for mode, says in (("prefill", "echo with logprobs"), ("decode", "echo with logprobs"), ("null", "")):
        monkeypatch.setattr(
            sglang_host, "server_arguments", lambda mode=mode: SimpleNamespace(disaggregation_mode=mode)
        )
        assert says in (front_end.refuse_completion(lambda *arguments: None, None, body) or "")
        assert front_end.refuse_completion(lambda *arguments: "its own", None, body) == "its own"


@pytest.mark.parametrize(
    ("earlier", "later", "refused"),
    [
        ({"bootstrap_room": 7}, {"bootstrap_room": 7}, True),
        ({"bootstrap_room": 7}, {"bootstrap_room": 8}, False),
        ({}, {}, False),
        ({"bootstrap_room": 7, "bootstrap_host": "2.2.2.2"}, {"bootstrap_room": 7}, False),
        ({"bootstrap_room": 7}, {"bootstrap_room": 7, "bootstrap_host": "2.2.2.2"}, False),
    ],
)
def test_a_room_has_one_request_at_a_time_and_the_first_keeps_it(monkeypatch, earlier, later, refused):
    """Past the router a client could name another's room: each could get the other's KV, or wait for ever."""
    from pdtrim_sglang import sglang_host
    from pdtrim_sglang.patches import front_end
    from sglang.srt.managers.io_struct import GenerateReqInput
    from sglang.srt.managers.tokenizer_manager import TokenizerManager

    monkeypatch.setattr(sglang_host, "server_arguments", lambda: SimpleNamespace(disaggregation_mode="prefill"))
    manager = SimpleNamespace(
        model_config=SimpleNamespace(vocab_size=512), rid_to_state={}, enable_trace=False, disaggregation_mode=None
    )
    options = {"input_ids": [5], "sampling_params": {}, "top_logprobs_num": 0, "logprob_start_len": -1}
    first, second = (
        GenerateReqInput(rid=rid, **options, **places) for rid, places in (("first", earlier), ("second", later))
    )
    for request in (first, second):
        TokenizerManager._init_req_state(manager, request)
    front_end.refuse_request(lambda *arguments: None, manager, first, [5])
    if refused:
        with pytest.raises(ValueError, match="bootstrap_room 7 is another request's, which has not ended"):
            front_end.refuse_request(lambda *arguments: None, manager, second, [5])
        del manager.rid_to_state["first"]  # it has its answer
    front_end.refuse_request(lambda *arguments: None, manager, second, [5])
