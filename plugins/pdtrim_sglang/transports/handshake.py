"""How the two ends of a transport's connection know each other, before the first chunk.

    decode  -> prefill   magic, version, nonce_d
    prefill -> decode    magic, version, nonce_p, plan digest, HMAC(key, "prefill" nonce_d nonce_p digest)
    decode  -> prefill   magic, verdict, HMAC(key, "decode" nonce_d nonce_p digest)

All frames have fixed lengths, and all three must be there within `seconds`. The key comes of the cluster's secret.
It keeps other programs out; it does not encrypt what follows: across an untrusted network use an encrypted one.
"""

from __future__ import annotations

import hmac
import secrets
import socket
import struct
import time
from dataclasses import dataclass, field
from functools import cached_property

from pdtrim_sglang.secret import derive

MAGIC, VERSION = b"PDTA", 1
_HELLO = struct.Struct("<4sH32s")
_PROOF = struct.Struct("<4sH32s32s32s")
_VERDICT = struct.Struct("<4sH32s")
WELCOME, WRONG_SECRET, WRONG_PLAN = range(3)


class HandshakeError(Exception):
    """The other end is no member of this cluster, or not in time; one sentence."""


@dataclass(frozen=True)
class Credentials:
    """What a worker shows: its plan's digest (32 bytes), and that it knows the secret."""

    digest: bytes = bytes(32)
    secret: bytes = field(default=b"", repr=False)

    @cached_property
    def _key(self) -> bytes:
        return derive(self.secret, b"transport")

    def proof(self, side: bytes, nonces: bytes, digest: bytes) -> bytes:
        """32 bytes that only who has the secret can make, good for this connection and this direction alone."""
        return hmac.digest(self._key, side + nonces + digest, "sha256")


def welcome(connection: socket.socket, credentials: Credentials, seconds: float) -> None:
    """The decode side: check who has connected. HandshakeError when it may not send; it is told why."""
    deadline = time.monotonic() + seconds
    nonce = secrets.token_bytes(32)
    _send(connection, _HELLO.pack(MAGIC, VERSION, nonce), deadline)
    magic, version, peer_nonce, digest, proof = _PROOF.unpack(_exactly(connection, _PROOF.size, deadline))
    if magic != MAGIC or version != VERSION:
        raise HandshakeError("it is no pdtrim prefill worker of this version")
    nonces = nonce + peer_nonce
    if not hmac.compare_digest(proof, credentials.proof(b"prefill", nonces, digest)):
        _send(connection, _VERDICT.pack(MAGIC, WRONG_SECRET, bytes(32)), deadline)
        raise HandshakeError("it does not have this cluster's secret")
    verdict = WELCOME if digest == credentials.digest else WRONG_PLAN
    _send(connection, _VERDICT.pack(MAGIC, verdict, credentials.proof(b"decode", nonces, digest)), deadline)
    if verdict != WELCOME:
        raise HandshakeError(f"it serves plan {digest.hex()}, this worker {credentials.digest.hex()}")


def introduce(connection: socket.socket, credentials: Credentials, seconds: float) -> None:
    """The prefill side: be let in, and check whom the KV goes to. HandshakeError when one of both fails."""
    deadline = time.monotonic() + seconds
    magic, version, peer_nonce = _HELLO.unpack(_exactly(connection, _HELLO.size, deadline))
    if magic != MAGIC or version != VERSION:
        raise HandshakeError("it is no pdtrim decode worker of this version")
    nonce = secrets.token_bytes(32)
    nonces = peer_nonce + nonce
    proof = credentials.proof(b"prefill", nonces, credentials.digest)
    _send(connection, _PROOF.pack(MAGIC, VERSION, nonce, credentials.digest, proof), deadline)
    magic, verdict, answer = _VERDICT.unpack(_exactly(connection, _VERDICT.size, deadline))
    if magic != MAGIC or verdict == WRONG_SECRET:
        raise HandshakeError("the two workers do not have the same secret; start all of a cluster with one secret file")
    if not hmac.compare_digest(answer, credentials.proof(b"decode", nonces, credentials.digest)):
        raise HandshakeError("it does not have this cluster's secret")
    if verdict != WELCOME:
        raise HandshakeError("it serves another plan; start both workers from one bundle")


def _exactly(connection: socket.socket, size: int, deadline: float) -> bytes:
    data = b""
    while len(data) < size:
        connection.settimeout(_left(deadline))
        part = connection.recv(size - len(data))
        if not part:
            raise HandshakeError("it hung up before it had shown who it is")
        data += part
    return data


def _send(connection: socket.socket, data: bytes, deadline: float) -> None:
    connection.settimeout(_left(deadline))
    connection.sendall(data)


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise HandshakeError("it did not show in time who it is")
    return left
