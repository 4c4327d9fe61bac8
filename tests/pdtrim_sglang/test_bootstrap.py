"""The bootstrap server hears members only; it believes a rank once, and nothing malformed."""

import asyncio
import itertools
import json
import socket
from contextlib import nullcontext
from types import SimpleNamespace

import pytest

pytest.importorskip("sglang", reason="needs the serve environment")
from aiohttp.test_utils import TestClient, TestServer
from pdtrim_sglang import bootstrap, hook_targets, identity, sglang_host
from pdtrim_sglang.bootstrap import PDTrimBootstrapServer
from pdtrim_sglang.signature import HEADER, Signature
from pdtrim_sglang.transports.handshake import Credentials
from sglang.srt.disaggregation.common import conn

RANK = {
    "attn_tp_size": 1, "attn_tp_rank": 0, "attn_cp_size": 1, "attn_cp_rank": 0, "attn_dp_size": 1, "attn_dp_rank": 0,
    "pp_size": 1, "pp_rank": 0, "system_dp_size": 1, "system_dp_rank": 0, "rank_ip": "127.0.0.1", "rank_port": 5000,
    "page_size": 1, "kv_cache_dtype": "float32",
}  # fmt: skip
WHERE = "/route?prefill_dp_rank=0&prefill_cp_rank=0&target_tp_rank=0&target_pp_rank=0"
READY = "/route?prefill_dp_rank=-1&prefill_cp_rank=-1&target_tp_rank=-1&target_pp_rank=-1"
OURS = Signature(Credentials(b"p" * 32, b"a secret of this cluster"))
OF_ANOTHER_PLAN = Signature(Credentials(b"q" * 32, OURS.credentials.secret))
STRANGERS = (None, Signature(Credentials(b"p" * 32)), Signature(Credentials(b"p" * 32, b"another secret, not ours")))


def talk(monkeypatch, conversation):
    """`conversation(ask)`, where `ask(method, target, body, signature)` gives a status and a text."""
    monkeypatch.setattr(PDTrimBootstrapServer, "run", lambda self: None)  # no thread, no port
    monkeypatch.setattr(sglang_host, "server_arguments", lambda: None)
    monkeypatch.setattr(identity, "signature_of", lambda _: OURS)

    async def all_of_it():
        async with TestClient(TestServer(PDTrimBootstrapServer("127.0.0.1", 0).app)) as client:

            async def ask(method, target, body="", by=OURS):
                data = (body if isinstance(body, str) else json.dumps(body)).encode()
                headers = {HEADER: by.of(method, target, data)} if by else {}
                reply = await client.request(method, target, data=data, headers=headers)
                return reply.status, await reply.text()

            await conversation(ask)

    asyncio.run(all_of_it())


def test_only_the_first_registration_of_a_rank_counts(monkeypatch):
    async def conversation(ask):
        assert (await ask("GET", WHERE))[0] == 503
        assert (await ask("PUT", "/route", RANK))[0] == 200
        assert (await ask("PUT", "/route", RANK | {"rank_port": 6666}))[0] == 409
        assert json.loads((await ask("GET", WHERE))[1])["rank_port"] == 5000

    talk(monkeypatch, conversation)


def test_a_registration_that_is_repeated_is_answered_as_the_first_time(monkeypatch):
    """SGLang repeats it when the answer was late; counted twice, a server of two ranks would be ready with one."""
    two = RANK | {"attn_tp_size": 2, "load_balance_method": "round_robin"}

    async def conversation(ask):
        for _ in range(3):
            assert (await ask("PUT", "/route", two))[0] == 200
        assert (await ask("GET", READY))[0] == 503
        for changed in ({"rank_ip": "127.0.0.2"}, {"page_size": 16}, {"load_balance_method": "other"}):
            assert (await ask("PUT", "/route", two | changed))[0] == 409
        assert (await ask("PUT", "/route", two | {"attn_tp_rank": 1}))[0] == 200
        assert (await ask("GET", READY))[0] == 200
        assert (await ask("PUT", "/route", two))[0] == 200

    talk(monkeypatch, conversation)


def test_a_registration_that_sglang_refuses_may_come_again_corrected(monkeypatch):
    two = RANK | {"attn_tp_size": 2}

    async def conversation(ask):
        assert (await ask("PUT", "/route", two))[0] == 200
        other = two | {"attn_tp_rank": 1}
        assert (await ask("PUT", "/route", other | {"decode_allocation_policy": "late"}))[0] == 400
        assert (await ask("PUT", "/route", other))[0] == 200

    talk(monkeypatch, conversation)


def test_a_rank_outside_of_its_group_or_of_another_group_is_not_counted(monkeypatch):
    two = RANK | {"attn_tp_size": 2}

    async def conversation(ask):
        assert (await ask("PUT", "/route", two))[0] == 200
        for wrong in ({"attn_tp_rank": 7, "attn_tp_size": 1}, {"attn_tp_rank": 2}, {"pp_rank": 1}, {"attn_dp_rank": 1},
                      {"attn_tp_rank": 7, "attn_tp_size": 8}, {"attn_dp_rank": 1, "attn_dp_size": 2},
                      {"system_dp_rank": 2, "system_dp_size": 2}):  # fmt: skip
            assert (await ask("PUT", "/route", two | wrong))[0] == 400
        assert (await ask("GET", READY))[0] == 503
        assert (await ask("PUT", "/route", two | {"attn_tp_rank": 1}))[0] == 200
        assert (await ask("GET", READY))[0] == 200

    talk(monkeypatch, conversation)


def test_the_malformed_is_told_so(monkeypatch):
    async def conversation(ask):
        for wrong in ({"rank_port": 70000}, {"attn_tp_rank": "0"}, {"rank_ip": "nowhere"}, {"page_size": None},
                      {"prefill_http_port": "x"}, {"kv_cache_dtype": 7}):  # fmt: skip
            assert (await ask("PUT", "/route", RANK | wrong))[0] == 400
        lacking = {key: value for key, value in RANK.items() if key != "kv_cache_dtype"}
        for wrong in (lacking, "", "[]", "{", '"x"', "[" * 100_000):
            assert (await ask("PUT", "/route", wrong))[0] == 400
        assert (await ask("PUT", "/route", RANK))[0] == 200
        assert (await ask("GET", WHERE.replace("=0", "=x", 1)))[0] == 400
        for path in ("/register_dp_rank", "/query_dp_ranks"):
            for body in ("{", "{}", "[]", "[" * 100_000, '{"bootstrap_rooms": ["x"], "bootstrap_room": "x"}',
                         '{"bootstrap_rooms": [Infinity], "bootstrap_room": Infinity, "dp_rank": 0}'):  # fmt: skip
                assert (await ask("POST", path, body))[0] == 400
            assert (await ask("POST", path, "x" * (bootstrap.MOST_BODY_BYTES + 1)))[0] == 413

    talk(monkeypatch, conversation)


@pytest.mark.parametrize("stranger", STRANGERS, ids=["unsigned", "without a secret", "with another secret"])
def test_strangers_are_not_heard(monkeypatch, stranger):
    room = {"bootstrap_room": 1, "dp_rank": 3}

    async def conversation(ask):
        assert (await ask("PUT", "/route", RANK, stranger))[0] == 403
        assert (await ask("PUT", "/route", RANK))[0] == 200
        for request in (("GET", WHERE), ("POST", "/register_dp_rank", room), ("POST", "/query_dp_ranks", {})):
            assert (await ask(*request, by=stranger))[0] == 403
        assert await ask("POST", "/query_dp_ranks", {"bootstrap_rooms": [1]}) == (200, "{}")
        assert (await ask("GET", "/health", by=stranger))[0] == 200

    talk(monkeypatch, conversation)


def test_a_worker_of_another_plan_may_read_and_no_more(monkeypatch):
    async def conversation(ask):
        assert (await ask("PUT", "/route", RANK, OF_ANOTHER_PLAN))[0] == 403
        assert (await ask("POST", "/register_dp_rank", {"bootstrap_room": 1, "dp_rank": 3}, OF_ANOTHER_PLAN))[0] == 403
        assert (await ask("PUT", "/route", RANK))[0] == 200
        assert (await ask("GET", WHERE, by=OF_ANOTHER_PLAN))[0] == 200
        assert (await ask("POST", "/query_dp_ranks", {"bootstrap_rooms": []}, OF_ANOTHER_PLAN))[0] == 200

    talk(monkeypatch, conversation)


def test_a_signature_is_for_one_request(monkeypatch):
    class Recorded:
        def of(self, *_):
            return OURS.of("PUT", "/route", json.dumps(RANK).encode())

    async def conversation(ask):
        assert (await ask("PUT", "/route", RANK | {"rank_port": 6666}, Recorded()))[0] == 403
        assert (await ask("GET", WHERE, by=Recorded()))[0] == 403

    talk(monkeypatch, conversation)


def listening(monkeypatch, tmp_path):
    """A server and its address; what SGLang asks from now on is signed with its secret."""
    secret = tmp_path / "secret"
    secret.write_text("a secret of this cluster")
    started = SimpleNamespace(
        host="127.0.0.1",
        model_path=str(tmp_path),
        json_model_override_args=json.dumps({"pdtrim_secret_file": str(secret)}),
    )
    monkeypatch.setattr(sglang_host, "server_arguments", lambda: started)
    monkeypatch.setattr(conn, "requests", conn.requests)  # put back afterwards
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    server = PDTrimBootstrapServer("127.0.0.1", port)
    identity.sign_requests(identity.signature_of(started))
    return server, f"127.0.0.1:{port}"


def test_what_sglang_itself_asks_is_signed(monkeypatch, tmp_path):
    """SGLang's own code registers a rank and a room, and finds them, at a server that listens."""
    server, place = listening(monkeypatch, tmp_path)
    conn.CommonKVManager._register_topology_row(None, f"http://{place}/route", RANK)
    ours = SimpleNamespace(bootstrap_addr=place, bootstrap_server_url=place, bootstrap_room=5)
    ours.kv_mgr = SimpleNamespace(attn_dp_rank=3)
    assert conn.CommonKVReceiver._get_bootstrap_info_from_server(ours, 0, 0, 0, 0)["rank_port"] == 5000
    conn.CommonKVSender._register_prefill_dp_rank(ours)
    assert conn.CommonKVReceiver.query_prefill_dp_ranks(place, [5, 6]) == {"5": 3}
    server.close()


@pytest.mark.parametrize(
    ("prefill", "decode_tp", "responses"),
    [
        ({}, 1, 1),
        ({}, 2, 1),
        ({"attn_tp_size": 2}, 2, 1),
        ({"attn_tp_size": 2}, 1, 2),
        ({"attn_tp_size": 8}, 1, 4),  # its four KV heads each have two copies, of which one is sent
        ({"attn_tp_size": 2}, 3, 0),
        ({"attn_dp_size": 2}, 1, 1),  # --tp-size 2 --dp-size 2 --enable-dp-attention: whole heads in each rank
        ({"attn_dp_size": 2}, 2, 1),
    ],
)
def test_decode_ends_at_its_first_sight_of_a_prefill_worker_of_ranks_that_cannot_be_paired(
    monkeypatch, tmp_path, prefill, decode_tp, responses
):
    """SGLang's own code registers the ranks of prefill and asks for them in decode; no request has a part in it.

    A request is ready after so many ranks' `responses`.
    """
    from pdtrim_sglang.decode import DecodeSide
    from pdtrim_sglang.manager import PDTrimKVManager

    server, place = listening(monkeypatch, tmp_path)
    sizes = {"attn_tp_size": 1, "attn_dp_size": 1} | prefill
    for tp, dp in itertools.product(range(sizes["attn_tp_size"]), range(sizes["attn_dp_size"])):
        group = {"attn_dp_rank": dp, "system_dp_rank": dp}  # as SGLang says of DP attention
        row = RANK | sizes | group | {"attn_tp_rank": tp, "rank_port": 5000 + 8 * dp + tp}
        conn.CommonKVManager._register_topology_row(None, f"http://{place}/route", row)
    decode = object.__new__(PDTrimKVManager)
    vars(decode).update(
        prefill_info_table={}, kv_args=SimpleNamespace(page_size=1, engine_rank=0, state_types=[]), kv_layout=None,
        kv_cache_dtype_str="float32", dsv41_spec_layout=None, attn_tp_size=decode_tp, attn_cp_size=1, dcp_size=1,
        pp_size=1, pp_rank=0, attn_cp_rank=0, is_mla_backend=False, is_hybrid_mla_backend=False, attn_tp_rank=0,
        enable_all_cp_ranks_for_transfer=False, decode_side=object.__new__(DecodeSide),
    )  # fmt: skip
    decode.plan = SimpleNamespace(model=SimpleNamespace(num_kv_heads=4, states=None))
    decode.decode_side._manager, decode.decode_side._plan = decode, decode.plan
    decode.decode_side._pool = SimpleNamespace(prepare=lambda *_: None)
    ranks = f"{sizes['attn_tp_size']} ranks in prefill, among {decode_tp} in decode"
    sentence = f"prefill worker at {place}: attention is divided among {ranks}, .*--tp-size"
    with nullcontext() if responses else pytest.raises(RuntimeError, match=sentence):
        assert decode.try_ensure_parallel_info(place)
        assert decode.prefill_info_table[place].required_prefill_response_num == responses
    server.close()


def test_a_bootstrap_server_that_listens_everywhere_wants_a_secret(monkeypatch, tmp_path):
    started = SimpleNamespace(host="0.0.0.0", model_path=str(tmp_path), json_model_override_args="{}")
    monkeypatch.setenv("SGLANG_HOST_IP", "127.0.0.1")
    with pytest.raises(RuntimeError, match=r"reached at 0\.0\.0\.0, from other machines: give all workers one secret"):
        identity.signature_of(started)
    started.host = "127.0.0.1"
    assert identity.signature_of(started).credentials.secret == b""


def test_a_worker_signs_before_it_registers(monkeypatch):
    """SGLang registers a prefill rank while its manager is being made."""
    from pdtrim_sglang import manager

    class Registered(Exception):
        pass

    def registers(*_):
        assert conn.requests._signature is OURS
        raise Registered

    monkeypatch.setattr(conn, "requests", conn.requests)
    monkeypatch.setattr(hook_targets, "check", lambda: None)
    monkeypatch.setattr(identity, "signature_of", lambda _: OURS)
    monkeypatch.setattr(manager, "check_options", lambda *_: None)
    monkeypatch.setattr(conn.CommonKVManager, "__init__", registers)
    with pytest.raises(Registered):
        manager.PDTrimKVManager(None, None, SimpleNamespace(model_path="/nowhere"))
