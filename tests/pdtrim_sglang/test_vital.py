"""A worker that has lost a thread it cannot serve without does not live on, to say yes to /health."""

import os
import signal
import socket
import threading
from types import SimpleNamespace

import pytest
from pdtrim_sglang import sglang_host, threads, vital
from pdtrim_sglang.transports import TRANSPORTS, TransportConfig


@pytest.fixture
def ended(monkeypatch):
    event = threading.Event()
    monkeypatch.setattr(sglang_host, "end_worker", event.set)
    return event


def fails(*_):
    raise RuntimeError("can't start new thread")


def out_of_memory(*_):
    raise MemoryError("out of memory")


def test_the_transport_server(ended, monkeypatch, caplog):
    server = TRANSPORTS["tcp"].server("127.0.0.1", SimpleNamespace(connections_changed=list), TransportConfig())
    monkeypatch.setattr(threads, "start", out_of_memory)  # RuntimeError, out of threads, may pass: test_transports.py
    socket.create_connection((server.host, server.port)).close()
    assert ended.wait(60)
    assert "this worker ends, since it cannot serve without its transport server" in caplog.text
    assert "out of memory" in caplog.text


@pytest.mark.parametrize("stage", ["prefill", "decode"])
def test_the_control_channel(ended, monkeypatch, stage):
    pytest.importorskip("sglang", reason="needs the serve environment")
    from pdtrim_sglang.decode import DecodeSide
    from pdtrim_sglang.prefill import PrefillSide

    server = SimpleNamespace(host="h", port=1)
    transport = SimpleNamespace(prepare=lambda *_: None, server=lambda *_: server)
    for module in ("prefill", "decode"):
        monkeypatch.setattr(f"pdtrim_sglang.{module}.transport_named", lambda _: transport)
    monkeypatch.setattr("pdtrim_sglang.prefill.TransferMetrics", lambda: None)  # its registry takes a name once
    monkeypatch.setattr("pdtrim_sglang.decode.HeldMetrics", lambda: None)
    manager = SimpleNamespace(
        local_ip="127.0.0.1",
        server_socket=SimpleNamespace(poll=fails, recv_multipart=fails),
        attn_tp_size=1,
        attn_tp_rank=0,
    )
    plan = SimpleNamespace(digest="00" * 32, model=SimpleNamespace(num_kv_heads=1))
    side = PrefillSide if stage == "prefill" else DecodeSide
    pool = SimpleNamespace(digest=lambda plan: plan.digest, draft_bytes=lambda start, stop: 0)
    side(manager, plan, pool, None, "tcp", TransportConfig())
    assert ended.wait(60)


def test_a_thread_that_ends_by_itself_is_no_failure(ended, monkeypatch):
    done = threading.Event()
    vital.start("sender", done.set)
    assert done.wait(60)
    assert not ended.wait(0.2)


def test_the_end_is_told_to_the_parent_as_sglang_does():
    heard = threading.Event()
    before = signal.signal(signal.SIGQUIT, lambda *_: heard.set())
    try:
        child = os.fork()
        if not child:
            sglang_host.end_worker()
            os._exit(0)
        os.waitpid(child, 0)
        assert heard.wait(60)
    finally:
        signal.signal(signal.SIGQUIT, before)
