"""An error of our own fails requests with a sentence, and its traceback is in the log; others need none."""

import logging
import socket
import threading
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("sglang", reason="needs the serve environment")
from pdtrim_sglang import peer as peers
from pdtrim_sglang.sessions import Sessions
from pdtrim_sglang.transports import TRANSPORTS, TransportConfig, nixl
from pdtrim_sglang.transports import channel as channels
from pdtrim_sglang.transports.base import TransportError, UnreachableError

CONFIG = TransportConfig(staging_bytes=1 << 10)


def traceback_of(caplog, kind):
    return [record for record in caplog.records if record.exc_info and record.exc_info[0] is kind]


@pytest.fixture
def address():
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield listening.getsockname()[:2]


@pytest.mark.parametrize(("error", "count"), [(AttributeError("no such field"), 1), (OSError("reset"), 0)])
def test_a_connection_that_cannot_be_made(monkeypatch, caplog, address, error, count):
    def fails(*_):
        raise error

    monkeypatch.setattr(channels, "introduce", fails)
    channel = TRANSPORTS["tcp"].channel(*address, None, CONFIG)
    with pytest.raises(UnreachableError, match="cannot reach decode worker 127"):
        channel.connect()
    assert len(traceback_of(caplog, type(error))) == count


@pytest.mark.parametrize(("error", "count"), [(TypeError("two arguments"), 1), (OSError("reset"), 0)])
def test_a_chunk_that_cannot_be_sent(monkeypatch, caplog, error, count):
    def fails(*_):
        raise error

    channel = TRANSPORTS["tcp"].channel("127.0.0.1", 1, None, CONFIG)
    monkeypatch.setattr(channel, "_reached", lambda: SimpleNamespace(socket=None, link=SimpleNamespace(move=fails)))
    header = SimpleNamespace(payload_bytes=1, encode=lambda _: b"")
    with pytest.raises(TransportError, match="cannot send to decode worker 127"):
        channel.send(header, memoryview(b""))
    assert len(traceback_of(caplog, type(error))) == count


@pytest.mark.parametrize(("error", "count"), [(KeyError("host"), 1), (RuntimeError("cannot pin memory"), 0)])
def test_a_decode_worker_that_cannot_be_prepared_for(caplog, error, count):
    def fails(_):
        raise error

    sessions = Sessions(fails)
    reason = sessions.register(SimpleNamespace(session="127.0.0.1:1"))
    assert reason.startswith("cannot prepare to send to decode worker 127.0.0.1:1: ")
    assert len(traceback_of(caplog, type(error))) == count


def test_a_chunk_that_cannot_be_packed(monkeypatch, caplog):
    failed, done = [], threading.Event()

    def fails(*_):
        raise TypeError("two arguments")

    def fail(room, reason):
        failed.append(reason)
        done.set()

    class Channel:
        slots = (torch.zeros(8, dtype=torch.uint8),)
        connect = close = lambda _: None

    owner = SimpleNamespace(progress=lambda _: True, is_live=lambda _: True, fail=fail, released=lambda: None)
    plan = SimpleNamespace(digest="00")
    monkeypatch.setattr(peers, "Packer", lambda *_: SimpleNamespace(pack=fails))
    pool = SimpleNamespace(digest=lambda _: "00")
    peer = peers.Peer("127.0.0.1", 1, lambda *_: Channel(), CONFIG, owner, plan, pool, None, 0)
    with caplog.at_level(logging.ERROR):
        peer.submit(SimpleNamespace(room=1))
        assert done.wait(60)
    assert failed == ["packing failed: two arguments"]
    assert len(traceback_of(caplog, TypeError)) == 1
    peer.close()


def test_an_error_of_ours_in_a_write_by_nixl_is_not_called_nixls():
    writer = object.__new__(nixl.NixlWriter)
    writer._lock, writer._agent = threading.Lock(), SimpleNamespace()
    with pytest.raises(AttributeError, match="get_xfer_descs"):
        writer.write(torch.zeros(8, dtype=torch.uint8), 8, ("agent", 0, 8, ("DRAM", 0)), 1.0)
