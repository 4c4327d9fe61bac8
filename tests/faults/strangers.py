"""What strangers, and members gone mad, say to a worker's ports."""

from __future__ import annotations

import contextlib
import hmac
import json
import os
import socket
import struct
import urllib.request
from pathlib import Path

from hypothesis import strategies as st

from pdtrim_deploy.serving.process import session_members

HOST = "127.0.0.1"
# pdtrim_sglang.transports.handshake and .protocol, whose modules need the serve environment.
HELLO, PROOF, VERDICT = "<4sH32s", "<4sH32s32s32s", "<4sH32s"
HEADER = "<4sHHI32sQIIIIQQ"

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
FRAME = st.one_of(
    st.binary(min_size=1, max_size=200),
    st.tuples(st.just(b"PDTK"), st.sampled_from([1, 1, 2]), st.integers(0, 3), U32, st.just(None), U64, U32, U32, U32,
              st.one_of(U32, st.integers(0, 300)), st.one_of(U64, st.integers(0, 5000)), U64),
)  # fmt: skip


def to_bootstrap(port: int, route: str, body: str) -> int:
    """An HTTP request; its status, 0 when the server hung up."""
    method, path = route.split()
    request = urllib.request.Request(f"http://{HOST}:{port}{path}?prefill_dp_rank=x", body.encode(), method=method)
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


def as_member(port: int, key: bytes, digest: bytes, frame: bytes | tuple) -> bool:
    """Introduce oneself rightly, then talk nonsense; whether one was let in."""
    with socket.create_connection((HOST, port), timeout=5) as connection:
        _, _, theirs = struct.unpack(HELLO, connection.recv(struct.calcsize(HELLO), socket.MSG_WAITALL))
        mine = os.urandom(32)
        proof = hmac.digest(key, b"prefill" + theirs + mine + digest, "sha256")
        connection.sendall(struct.pack(PROOF, b"PDTA", 1, mine, digest, proof))
        _, verdict, _ = struct.unpack(VERDICT, connection.recv(struct.calcsize(VERDICT), socket.MSG_WAITALL))
        data = frame if isinstance(frame, bytes) else struct.pack(HEADER, *frame[:4], digest, *frame[5:])
        with contextlib.suppress(OSError):
            connection.sendall(data)
            connection.settimeout(0.02)
            connection.recv(4000)
        return verdict == 0


def zmq_ports(session: int) -> list[int]:
    """Ports where a worker's processes listen and greet as ZMQ does."""
    inodes = set()
    for pid in session_members(session):
        for link in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                inodes.add(os.readlink(link).removeprefix("socket:[").rstrip("]"))
    found = []
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        if fields[3] == "0A" and fields[9] in inodes:
            port = int(fields[1].partition(":")[2], 16)
            with contextlib.suppress(OSError), socket.create_connection((HOST, port), timeout=1) as connection:
                connection.settimeout(0.3)
                if connection.recv(1) == b"\xff":
                    found.append(port)
    return found
