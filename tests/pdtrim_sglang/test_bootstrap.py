"""The bootstrap server believes a rank once, and nothing malformed."""

import asyncio

import pytest

pytest.importorskip("sglang", reason="needs the serve environment")
from aiohttp.test_utils import TestClient, TestServer
from pdtrim_sglang.bootstrap import PDTrimBootstrapServer

RANK = {
    "attn_tp_size": 1, "attn_tp_rank": 0, "attn_cp_size": 1, "attn_cp_rank": 0, "attn_dp_size": 1, "attn_dp_rank": 0,
    "pp_size": 1, "pp_rank": 0, "system_dp_size": 1, "system_dp_rank": 0, "rank_ip": "127.0.0.1", "rank_port": 5000,
    "page_size": 1, "kv_cache_dtype": "float32",
}  # fmt: skip
WHERE = {"prefill_dp_rank": "0", "prefill_cp_rank": "0", "target_tp_rank": "0", "target_pp_rank": "0"}


def test_only_the_first_registration_of_a_rank_counts(monkeypatch):
    monkeypatch.setattr(PDTrimBootstrapServer, "run", lambda self: None)  # no thread, no port

    async def talk():
        async with TestClient(TestServer(PDTrimBootstrapServer("127.0.0.1", 0).app)) as client:
            for wrong in ({"rank_port": 70000}, {"attn_tp_rank": "0"}, {"rank_ip": "nowhere"}, {"page_size": None}):
                assert (await client.put("/route", json=RANK | wrong)).status == 400
            for wrong in ("", "[]", "{", '"x"'):
                assert (await client.put("/route", data=wrong)).status == 400
            assert (await client.get("/route", params=WHERE)).status == 503
            assert (await client.put("/route", json=RANK)).status == 200
            assert (await client.put("/route", json=RANK | {"rank_port": 6666})).status == 409
            reply = await client.get("/route", params=WHERE)
            assert (await reply.json())["rank_port"] == 5000
            assert (await client.get("/route", params=WHERE | {"prefill_dp_rank": "x"})).status == 400
            for path in ("/register_dp_rank", "/query_dp_ranks"):
                for body in ("{", "{}", "[]", '{"bootstrap_rooms": ["x"], "bootstrap_room": "x", "dp_rank": 0}'):
                    assert (await client.post(path, data=body)).status == 400

    asyncio.run(talk())
