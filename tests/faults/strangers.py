"""What strangers, and members gone mad, say to a worker's ports."""

from __future__ import annotations

import contextlib
import hmac
import json
import os
import re
import socket
import struct
import subprocess
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from hypothesis import strategies as st

from pdtrim_deploy.kvcache.layout import chunk_layout
from pdtrim_deploy.plan import PDPlan
from pdtrim_deploy.serving.process import session_members

HOST = "127.0.0.1"
# pdtrim_sglang.transports.handshake, .signature and .protocol, whose modules need the serve environment.
HELLO, PROOF, VERDICT = "<4sH32s", "<4sH32s32s32s", "<4sH32s"
SIGNATURE = "X-PDTrim-Signature"
(PLUGIN,) = find_spec("pdtrim_sglang").submodule_search_locations
PROTOCOL = Path(PLUGIN, "protocol.py").read_text()  # its layout, from the source: a copy here would fall behind
VERSION = int(re.search(r"^VERSION = (\d+)", PROTOCOL, re.MULTILINE)[1])
HEADER = re.search(r'^_HEADER = struct.Struct\("(.+)"\)', PROTOCOL, re.MULTILINE)[1]
CHECKSUM = (
    "import sys, xxhash\nfor line in sys.stdin: print(xxhash.xxh3_64(bytes.fromhex(line)).intdigest(), flush=True)"
)

KEYS = (
    "attn_tp_size", "attn_tp_rank", "attn_cp_size", "attn_cp_rank", "attn_dp_size", "attn_dp_rank", "pp_size",
    "pp_rank", "system_dp_size", "system_dp_rank", "rank_ip", "rank_port", "page_size", "kv_cache_dtype",
)  # fmt: skip
VALUE = st.one_of(st.integers(-1, 70000), st.sampled_from([0, 1, None, "127.0.0.1", "x", [], {}, 1.5, True]))
ROUTE = st.fixed_dictionaries(dict.fromkeys(KEYS, VALUE))  # whole, so that some of it could be believed
HTTP = st.tuples(
    st.sampled_from(["PUT /route", "GET /route", "POST /register_dp_rank", "POST /query_dp_ranks", "PUT /other"]),
    st.one_of(
        ROUTE.map(json.dumps),
        st.dictionaries(st.sampled_from(["bootstrap_room", "dp_rank"]), VALUE).map(json.dumps),
        st.text(max_size=60),
    ),
)
RAW = st.one_of(st.binary(max_size=300), st.binary(max_size=60).map(lambda tail: b"PDTA\x01\x00" + tail),
                st.binary(max_size=60).map(lambda tail: b"\xff\0\0\0\0\0\0\0\x01\x7f\x03" + tail))  # fmt: skip
U32, U64 = st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1)


@dataclass(frozen=True)
class Chunk:
    """A header that is mostly right; `payload` None: the plan's length, and a body; `sound`: its checksum is right.

    `heads` are the first KV head and how many; None: those of the rank that is spoken to. `layers` are likewise.
    `reused` are tokens whose rows decode has.
    """

    version: int
    flags: int
    rank: int
    heads: tuple[int, int] | None
    room: int
    extent: list[int]
    aux: int
    payload: int | None
    sound: bool
    layers: tuple[int, int] = (0, 0)
    reused: int = 0

    def encode(self, plan: PDPlan, own_heads: int, checksum: Callable[[bytes], int]) -> bytes:
        """Header, and the body that it announces if that is the plan's, to the first rank, which has `own_heads`."""
        start, stop, tokens = self.extent
        payload = self.payload
        if payload is None:
            payload = chunk_layout(plan, tokens, start, stop, own_heads, reused_tokens=self.reused).total_bytes
        fixed = struct.pack(
            HEADER, b"PDTK", self.version, self.flags, self.rank, *(self.heads or (0, own_heads)), *self.layers,
            bytes.fromhex(plan.digest), self.room, tokens, self.reused, start, stop, self.aux, payload,
        )  # fmt: skip
        body = os.urandom(payload + min(self.aux, 4096)) if self.payload is None else b""
        return fixed + struct.pack("<Q", checksum(fixed + body) if self.sound else 1) + body


CHUNK = st.builds(
    Chunk,
    version=st.sampled_from([*[VERSION] * 7, VERSION - 1]),
    flags=st.sampled_from([0, 0, 2, 1]),
    rank=U32,
    heads=st.one_of(*[st.none()] * 7, st.tuples(st.integers(0, 9), st.integers(0, 9))),
    room=st.integers(0, 300),
    extent=st.lists(st.one_of(st.integers(0, 300), st.integers(0, 4096)), min_size=3, max_size=3).map(sorted),
    aux=st.one_of(st.just(0), st.just(0), st.integers(0, 300), U32),
    payload=st.one_of(st.none(), st.none(), st.integers(0, 5000), U64),
    sound=st.booleans(),
    layers=st.one_of(*[st.just((0, 0))] * 7, st.tuples(st.integers(0, 9), st.integers(0, 9))),
    reused=st.one_of(*[st.just(0)] * 3, st.integers(0, 300)),
)
FRAME = st.one_of(CHUNK, CHUNK, CHUNK, st.binary(min_size=1, max_size=200))


@contextlib.contextmanager
def checksums(python: Path | str) -> Iterator[Callable[[bytes], int]]:
    """The protocol's checksum, by a Python that has it."""
    with subprocess.Popen(
        [python, "-c", CHECKSUM], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:

        def checksum(data: bytes) -> int:
            process.stdin.write(data.hex() + "\n")
            process.stdin.flush()
            return int(process.stdout.readline())

        yield checksum


def signature(key: bytes, digest: bytes) -> Callable[[str, str, bytes], str]:
    """What a member signs a request to the bootstrap server with."""

    def of(method: str, target: str, body: bytes) -> str:
        shown = bytes(32) if method == "GET" or target == "/query_dp_ranks" else digest
        return hmac.digest(key, b"\0".join((method.encode(), target.encode(), shown + body)), "sha256").hex()

    return of


def to_bootstrap(port: int, route: str, body: str, sign: Callable[[str, str, bytes], str] | None = None) -> int:
    """An HTTP request; its status, 0 when the server hung up."""
    method, target = route.split()
    target += "?prefill_dp_rank=x" if method == "GET" else ""
    headers = {SIGNATURE: sign(method, target, body.encode())} if sign else {}
    request = urllib.request.Request(f"http://{HOST}:{port}{target}", body.encode(), headers, method=method)
    try:
        with urllib.request.urlopen(request, timeout=10) as reply:
            return reply.status
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0


def to_port(port: int, data: bytes) -> None:
    """Raw bytes, and hang up."""
    with contextlib.suppress(OSError), socket.create_connection((HOST, port), timeout=5) as connection:
        connection.sendall(data)
        connection.settimeout(0.02)
        connection.recv(1000)


def as_member(port: int, key: bytes, digest: bytes, data: bytes) -> tuple[bool, bytes]:
    """Introduce oneself rightly, then talk nonsense; whether one was let in, and what one was answered."""
    with socket.create_connection((HOST, port), timeout=5) as connection:
        _, _, theirs = struct.unpack(HELLO, connection.recv(struct.calcsize(HELLO), socket.MSG_WAITALL))
        mine = os.urandom(32)
        proof = hmac.digest(key, b"prefill" + theirs + mine + digest, "sha256")
        connection.sendall(struct.pack(PROOF, b"PDTA", 1, mine, digest, proof))
        _, verdict, _ = struct.unpack(VERDICT, connection.recv(struct.calcsize(VERDICT), socket.MSG_WAITALL))
        answer = b""
        with contextlib.suppress(OSError):
            connection.sendall(data)
            connection.settimeout(1 if len(data) > struct.calcsize(HEADER) else 0.02)
            answer = connection.recv(4000)
        return verdict == 0, answer


def zmq_ports(session: int) -> list[int]:
    """Ports where a worker's processes listen and greet as ZMQ does."""
    inodes = set()
    for pid in session_members(session):
        for link in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                inodes.add(os.readlink(link).removeprefix("socket:[").rstrip("]"))
    ports = []
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        if fields[3] == "0A" and fields[9] in inodes:
            port = int(fields[1].partition(":")[2], 16)
            with contextlib.suppress(OSError), socket.create_connection((HOST, port), timeout=1) as connection:
                connection.settimeout(0.3)
                if connection.recv(1) == b"\xff":
                    ports.append(port)
    return ports
