"""Who has no secret, or another plan, is kept out; malformed bytes end a connection and nothing else."""

import ast
import queue
import socket
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import zmq
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pdtrim_sglang import control, secret
from pdtrim_sglang.protocol import ChunkHeader, ProtocolError, Reply
from pdtrim_sglang.transports import TRANSPORTS, TransportConfig
from pdtrim_sglang.transports.base import TransportError
from pdtrim_sglang.transports.handshake import Credentials, HandshakeError, introduce, welcome

PLUGIN = Path(secret.__file__).parent
OURS = Credentials(b"p" * 32, b"a secret of this cluster")
MOST = 1 << 12


def config(credentials=OURS, **more):
    return TransportConfig(staging_bytes=MOST, connect_seconds=30, stall_seconds=30, credentials=credentials, **more)


class Handler:
    """As the decode side: lengths are checked before the body is read."""

    def __init__(self):
        self.got = []

    def connections_changed(self):
        pass

    def admit(self, header):
        if header.payload_bytes > MOST or header.aux_bytes > 64:
            raise ProtocolError("not the plan's lengths")

    def deliver(self, header, payload, aux):
        self.got.append((header, payload.clone()))
        return Reply(header.room)


class Listener:
    def __init__(self):
        self.events = queue.Queue()

    def on_reply(self, reply):
        self.events.put(reply)

    def on_lost(self, reason):
        self.events.put(reason)


@pytest.fixture(scope="module")
def server():
    handler = Handler()
    tcp_server = TRANSPORTS["tcp"].server("127.0.0.1", handler, config())
    yield tcp_server, handler
    tcp_server.close()


def send(server, credentials, room=1):
    listener = Listener()
    channel = TRANSPORTS["tcp"].channel(server.host, server.port, listener, config(credentials))
    try:
        channel.send(ChunkHeader(bytes(32), room, 0, 8, 0, 8, 0, 8, False, range(1)), memoryview(b""))
        return listener.events.get(timeout=60)
    finally:
        channel.close()


def test_a_member_is_let_in(server):
    assert send(server[0], OURS) == Reply(1)


@pytest.mark.parametrize(
    ("credentials", "says"),
    [
        (Credentials(OURS.digest, b"another secret, not ours"), "do not have the same secret"),
        (Credentials(OURS.digest), "do not have the same secret"),
        (Credentials(b"q" * 32, OURS.secret), "it serves another plan; start both workers from one bundle"),
    ],
)
def test_others_are_kept_out_and_told_why(server, credentials, says):
    before = len(server[1].got)
    with pytest.raises(TransportError, match=says):
        send(server[0], credentials)
    assert len(server[1].got) == before


def test_a_false_decode_worker_gets_no_kv():
    """Who only listens on the port, and lets everyone in, is found out."""
    near, far = socket.socketpair()

    def impostor():
        with pytest.raises(HandshakeError):
            welcome(far, Credentials(OURS.digest, b"does not know the secret"), 30)

    thread = threading.Thread(target=impostor)
    thread.start()
    with pytest.raises(HandshakeError, match="same secret"):
        introduce(near, OURS, 30)
    thread.join()
    near, far = socket.socketpair()

    def yes_man():
        far.sendall(b"PDTA\x01\x00" + bytes(32))
        far.recv(1000)
        far.sendall(b"PDTA\x00\x00" + bytes(32))

    threading.Thread(target=yes_man).start()
    with pytest.raises(HandshakeError, match="does not have this cluster's secret"):
        introduce(near, OURS, 30)


def test_a_recorded_introduction_is_worth_nothing(server):
    tcp_server, _ = server
    with socket.create_connection((tcp_server.host, tcp_server.port)) as first:
        recorded = _Recorder(first)
        introduce(recorded, OURS, 30)
    with socket.create_connection((tcp_server.host, tcp_server.port)) as again:
        again.recv(38)
        again.sendall(recorded.sent)
        assert again.recv(38)[4:6] == b"\x01\x00"  # WRONG_SECRET


class _Recorder:
    def __init__(self, connection):
        self._connection, self.sent = connection, b""

    def sendall(self, data):
        self.sent += data
        self._connection.sendall(data)

    def __getattr__(self, name):
        return getattr(self._connection, name)


def test_who_says_nothing_is_hung_up_on():
    tcp_server = TRANSPORTS["tcp"].server("127.0.0.1", Handler(), replace(config(), connect_seconds=1))
    with socket.create_connection((tcp_server.host, tcp_server.port), timeout=60) as silent:
        assert len(silent.recv(38)) == 38
        started = time.monotonic()
        assert silent.recv(1) == b""
        assert time.monotonic() - started < 30
    tcp_server.close()


def test_members_are_bounded():
    tcp_server = TRANSPORTS["tcp"].server("127.0.0.1", Handler(), config(connections=3))
    held = []
    for before in range(4):
        deadline = time.monotonic() + 60
        while tcp_server.held()[0] < before and time.monotonic() < deadline:
            time.sleep(0.01)
        held.append(socket.create_connection((tcp_server.host, tcp_server.port), timeout=60))
        introduce(held[-1], OURS, 30)
    held[3].settimeout(60)
    assert held[3].recv(1) == b""
    for member in held[:3]:
        member.settimeout(0.5)
        with pytest.raises(TimeoutError):
            member.recv(1)
    for member in held:
        member.close()
    tcp_server.close()


def test_silent_strangers_keep_no_member_out():
    """As many as a server keeps, in its full time to show who they are."""
    tcp_server = TRANSPORTS["tcp"].server("127.0.0.1", Handler(), replace(config(), connect_seconds=240))
    silent = [socket.create_connection((tcp_server.host, tcp_server.port), timeout=60) for _ in range(256)]
    assert len(silent[-1].recv(38)) == 38
    started = time.monotonic()
    assert send(tcp_server, OURS, room=3) == Reply(3)
    assert time.monotonic() - started < 120
    assert len(silent[0].recv(38)) == 38
    assert silent[0].recv(1) == b"", "the oldest made room"
    assert len(silent[1].recv(38)) == 38
    silent[1].settimeout(0.2)
    with pytest.raises(TimeoutError):
        silent[1].recv(1)
    for stranger in silent:
        stranger.close()
    tcp_server.close()


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.one_of(
        st.tuples(st.just(False), st.binary(max_size=300)),  # instead of an introduction
        st.tuples(st.just(True), st.binary(min_size=1, max_size=300)),  # instead of a chunk
        st.tuples(  # a chunk's header with lengths that lie
            st.just(True),
            st.builds(
                lambda *sizes: ChunkHeader(bytes(32), sizes[2], 0, 8, 0, 8, *sizes[:2], True, range(1)).encode(()),
                st.integers(65, 2**32 - 1), st.integers(0, 2**63 - 1), st.integers(0, 2**63 - 1),
            ),
        ),
    )
)  # fmt: skip
def test_malformed_messages_end_their_connection_and_nothing_else(server, message):
    tcp_server, handler = server
    member, data = message
    delivered = len(handler.got)
    with socket.create_connection((tcp_server.host, tcp_server.port), timeout=60) as connection:
        if member:
            introduce(connection, OURS, 30)
        connection.settimeout(60)
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
        while connection.recv(4096):
            pass
    assert len(handler.got) == delivered


def test_after_all_that_the_server_serves(server):
    tcp_server, _ = server
    assert send(tcp_server, OURS, room=7) == Reply(7)
    deadline = time.monotonic() + 60
    while tcp_server._members and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not tcp_server._members


@pytest.fixture
def channel():
    """A control channel as SGLang binds it, then protected."""
    opened = []

    def make(key):
        context, clients = zmq.Context(), zmq.Context()
        server = context.socket(zmq.PULL)
        server.bind("tcp://127.0.0.1:*")
        place = server.last_endpoint
        control.protect(server, (clients,), key)
        assert server.last_endpoint == place
        server.setsockopt(zmq.RCVTIMEO, 700)
        opened.append((server, context, clients))
        return server, clients

    yield make
    for server, *contexts in opened:
        server.close(linger=0)  # its monitor closes itself then
        for context in contexts:
            context.term()


def say(context, place, frames, until=lambda: True):
    """Say it, and stay connected until that is true."""
    with context.socket(zmq.PUSH) as client:
        client.setsockopt(zmq.LINGER, 500)
        monitor = client.get_monitor_socket(zmq.EVENT_DISCONNECTED)  # as SGLang does
        client.connect(place)
        client.send_multipart(frames)
        time.sleep(0.3)
        deadline = time.monotonic() + 60
        while not until() and time.monotonic() < deadline:
            time.sleep(0.01)
        client.disable_monitor()
        monitor.close(linger=0)


def hears(server, context, frames):
    """What the server hears when it is told so."""
    server.setsockopt(zmq.RCVTIMEO, 60_000)
    say(context, server.last_endpoint, frames, until=lambda: server.poll(0))
    return server.recv_multipart()


def test_the_control_channel_hears_members_only(channel, caplog):
    server, members = channel(OURS.secret)
    _, others = channel(b"another secret, not ours")
    stranger = zmq.Context()
    refused = "refused a peer that does not have this cluster's secret"
    for outsider in (stranger, others):
        say(outsider, server.last_endpoint, [b"PDTRIM-ROOM", b"{}"], until=lambda: refused in caplog.text)
    with pytest.raises(zmq.Again):
        server.recv_multipart()
    assert hears(server, members, [b"PDTRIM-ROOM", b"{}"]) == [b"PDTRIM-ROOM", b"{}"]
    assert refused in caplog.text
    stranger.destroy(linger=0)


@pytest.mark.parametrize("key", [b"", OURS.secret], ids=["without a secret", "with one"])
def test_a_long_message_is_never_taken_in(channel, key):
    server, clients = channel(key)
    say(clients, server.last_endpoint, [b"x" * (control.MOST_MESSAGE_BYTES + 1)])
    with pytest.raises(zmq.Again):
        server.recv_multipart()
    half = [b"x" * (control.MOST_MESSAGE_BYTES // 2)]
    assert hears(server, clients, half) == half


def test_the_secret_is_read_from_its_file(tmp_path):
    path = tmp_path / "s"
    with pytest.raises(RuntimeError, match="cannot be read: No such file"):
        secret.read_secret(str(path), "127.0.0.1")
    path.write_text("short\n")
    with pytest.raises(RuntimeError, match="holds 5 bytes, allowed: 16 to 4096; make one with: openssl"):
        secret.read_secret(str(path), "127.0.0.1")
    path.write_text("0123456789abcdef\n")
    assert secret.read_secret(str(path), "127.0.0.1") == b"0123456789abcdef"
    assert secret.read_secret(None, "127.0.0.1") == b""
    with pytest.raises(RuntimeError, match=r"reached at 10.0.0.1, from other machines: give all .* one secret file"):
        secret.read_secret(None, "10.0.0.1")
    assert repr(OURS.secret) not in repr(OURS)


def test_where_a_worker_listens_may_be_a_name(monkeypatch):
    for host in ("localhost", "::1", "[::1]", "127.0.0.2"):
        assert secret.read_secret(None, host, "127.0.0.1") == b""
    for host in ("0.0.0.0", "::", "", "10.0.0.1"):
        with pytest.raises(RuntimeError, match=f"reached at {host}, from other machines"):
            secret.read_secret(None, "127.0.0.1", host)
    with pytest.raises(RuntimeError, match=r"no-such-host\.invalid is neither an address nor a host name known here"):
        secret.read_secret(None, "no-such-host.invalid")


def test_keys_differ_by_purpose_and_secret():
    keys = {secret.derive(key, purpose) for key in (b"a" * 16, b"b" * 16) for purpose in (b"x", b"y")}
    assert len(keys) == 4


def test_nothing_here_unpickles_or_evaluates():
    forbidden = {"pickle", "marshal", "shelve", "dill", "cloudpickle"}
    for path in PLUGIN.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, (ast.Import, ast.ImportFrom)) else []
            if isinstance(node, ast.ImportFrom):
                names.append(node.module or "")
            assert not forbidden & {name.split(".")[0] for name in names}, path
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in ("eval", "exec", "torch.load", "np.load"), path
                assert not called.endswith("recv_pyobj"), path
