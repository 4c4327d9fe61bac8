"""The relay that simulates a slower link: which bytes it forwards, how fast, and when it ends."""

import contextlib
import socket
import threading
import time
from types import SimpleNamespace

import pytest

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.serving import WorkerOptions, relay, throttled
from pdtrim_deploy.serving.ports import free_ports
from pdtrim_deploy.serving.relay import READ_BYTES, SLACK_S, Relay, Throttle


@pytest.fixture
def end():
    """A server that echoes each message of `SIZE` bytes after reading all of it."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer():
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = server.accept()
                    threading.Thread(target=echo, args=(connection,), daemon=True).start()

        threading.Thread(target=answer, daemon=True).start()
        yield server.getsockname()[1]


def echo(connection):
    with connection:
        while data := connection.recv(1 << 16):
            connection.sendall(data)


def through(port, data):
    """The reply, and its seconds."""
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        begun, got = time.monotonic(), bytearray()
        threading.Thread(target=connection.sendall, args=(data,), daemon=True).start()
        while len(got) < len(data) and (part := connection.recv(1 << 16)):
            got += part
        return bytes(got), time.monotonic() - begun


def test_bytes_pass_both_ways_unchanged(end):
    (port,) = free_ports(1)
    with contextlib.closing(Relay(port, end)):
        data = bytes(range(256)) * 4000
        assert through(port, data)[0] == data


def test_a_throttle_lets_its_speed_through_over_all_connections(end):
    (port,) = free_ports(1)
    with contextlib.closing(Throttle(port, end, 4e6)):
        data = bytes(400_000)
        got, alone = through(port, data)
        assert got == data
        took = []
        both = [threading.Thread(target=lambda: took.append(through(port, data)[1])) for _ in range(2)]
        for thread in both:
            thread.start()
        for thread in both:
            thread.join()
    assert alone >= 0.09  # 0.1 s less what a token bucket of 5 ms lets go at once
    assert max(took) >= 0.19


def test_a_throttle_is_as_fast_as_its_link(end, monkeypatch):
    """By a clock that only its own sleeps move: on a busy machine they last longer than they should."""
    now = [100.0]
    clock = SimpleNamespace(monotonic=lambda: now[0], sleep=lambda seconds: now.__setitem__(0, now[0] + seconds))
    monkeypatch.setattr(relay, "time", clock)
    with contextlib.closing(Throttle(free_ports(1)[0], end, 4e6)) as link:
        for _ in range(20):
            assert link.passed(bytes(READ_BYTES), 0) == (bytes(READ_BYTES), False)
        assert now[0] - 100 == pytest.approx(20 * READ_BYTES / 4e6, abs=2 * SLACK_S)
        now[0] += 60  # what was not used is lost
        link.passed(bytes(READ_BYTES), 0)
        assert now[0] - 160 == pytest.approx(21 * READ_BYTES / 4e6, abs=3 * SLACK_S)


def test_a_closed_relay_is_gone(end):
    (port,) = free_ports(1)
    closed = Relay(port, end)
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        connection.sendall(b"x")
        assert connection.recv(1) == b"x"
        closed.close()
        assert connection.recv(1) == b""
    with pytest.raises(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):  # noqa: PT011
        pass


def test_a_link_to_several_ranks_of_decode_is_refused_before_anything_starts():
    decode = SimpleNamespace(options=WorkerOptions(device="cpu", tp_decode=2))
    cluster = SimpleNamespace(spec=SimpleNamespace(decode=(decode,), unified=False))
    with pytest.raises(UserError, match="--link limits KV to one rank of decode, not to 2"), throttled(cluster, None):
        pass
