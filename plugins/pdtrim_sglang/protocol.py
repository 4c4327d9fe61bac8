"""The frames that carry packed KV between two workers: fixed header, packed rows, aux row; and their replies.

Little-endian, versioned, every length checked against the plan's arithmetic before a byte is read. Pure: no torch.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass

import xxhash

MAGIC = b"PDTK"
# 2: int4 of 4.25 bits; 3: k4v3, int3, their first row native; 4: a range of heads; 5: of layers; 6: reused tokens;
# 7: states
VERSION = 7
_HEADER = struct.Struct("<4sHHIHHHH32sQIIIIIQ")
_CHECKSUM = struct.Struct("<Q")
HEADER_BYTES = _HEADER.size + _CHECKSUM.size
_REPLY = struct.Struct("<4sHHQH")
REPLY_BYTES = _REPLY.size
MAX_REASON_BYTES = 2048
_LAST, _STATES = 1, 2


class ProtocolError(Exception):
    """The peer sent something that this version does not understand; the connection is of no more use."""


@dataclass(frozen=True)
class ChunkHeader:
    """One chunk of one request.

    Attributes:
        digest: plan digest, 32 bytes.
        room: SGLang's bootstrap_room, 63 bits.
        rank: sender's rank, as SGLang counts prefill responses: of its group of attention ranks.
        prompt_tokens, start, stop: the chunk is prompt tokens `[start, stop)` of a prompt of that many.
        aux_bytes: length of the aux row (first token, its logprobs, room), 0 before the last chunk.
        payload_bytes: length of the packed rows.
        heads: the KV heads whose rows they are, as the model counts them.
        layers: the KV layers of decode whose rows they are; None: all. On the wire none are all.
        reused_tokens: of the prompt's first tokens, so many have no rows of full layers here: decode has them.
        states: the chunk has no rows, but what these of the layers with linear attention keep behind the prompt; they
            stand on the wire in the place of `layers`, which are then None.

    """

    digest: bytes
    room: int
    rank: int
    prompt_tokens: int
    start: int
    stop: int
    aux_bytes: int
    payload_bytes: int
    last: bool
    heads: range
    layers: range | None = None
    reused_tokens: int = 0
    states: range | None = None

    def encode(self, body: Iterable[memoryview | bytes]) -> bytes:
        """Header bytes with the XXH3-64 checksum of header and body.

        A payload on a GPU stands in `body` by its own checksum, 8 bytes (`pdtrim_deploy.kvcache.checksum`).
        """
        layers = self.states or self.layers or range(0)
        flags = (_LAST if self.last else 0) | (_STATES if self.states else 0)
        fixed = _HEADER.pack(
            MAGIC, VERSION, flags, self.rank, self.heads.start, len(self.heads), layers.start,
            len(layers), self.digest, self.room, self.prompt_tokens, self.reused_tokens, self.start, self.stop,
            self.aux_bytes, self.payload_bytes,
        )  # fmt: skip
        return fixed + _CHECKSUM.pack(_checksum(fixed, body))

    @classmethod
    def decode(cls, data: bytes) -> ChunkHeader:
        """Parse `HEADER_BYTES`; ProtocolError when it is not a chunk header of this version."""
        magic, version, flags, rank, head, heads, layer, layers, digest, *rest = _HEADER.unpack_from(data)
        if magic != MAGIC:
            raise ProtocolError("not a pdtrim chunk: the peer speaks another protocol")
        if version != VERSION:
            raise ProtocolError(f"protocol version {version}, this worker speaks {VERSION}: upgrade both together")
        room, tokens, reused, start, stop, aux, payload = rest
        if not start <= stop <= tokens:
            raise ProtocolError(f"chunk [{start}, {stop}) does not lie in a prompt of {tokens} tokens")
        if reused > tokens:
            raise ProtocolError(f"{reused} reused tokens of a prompt of {tokens}")
        held, of = range(head, head + heads), range(layer, layer + layers) or None
        states = of if flags & _STATES else None
        if flags & _STATES and (states is None or start != tokens):
            raise ProtocolError(f"states of {layers} layers at token {start} of a prompt of {tokens} tokens")
        rows, last = None if states else of, bool(flags & _LAST)
        return cls(digest, room, rank, tokens, start, stop, aux, payload, last, held, rows, reused, states)


def body_matches(header: bytes, body: Iterable[memoryview | bytes]) -> bool:
    """Whether the checksum in `header` is that of header and body."""
    return _CHECKSUM.unpack_from(header, _HEADER.size)[0] == _checksum(header[: _HEADER.size], body)


def _checksum(fixed: bytes, body: Iterable[memoryview | bytes]) -> int:
    digest = xxhash.xxh3_64(fixed)
    for part in body:
        digest.update(part)
    return digest.intdigest()


@dataclass(frozen=True)
class Reply:
    """The receiver's word on one chunk, in the order of the chunks: scattered, or why not."""

    room: int
    reason: str = ""

    @property
    def ok(self) -> bool:
        """Whether the chunk was scattered."""
        return not self.reason

    def encode(self) -> bytes:
        """Reply bytes: fixed part, then the reason in UTF-8."""
        reason = self.reason.encode()[:MAX_REASON_BYTES]
        return _REPLY.pack(MAGIC, VERSION, 0, self.room, len(reason)) + reason

    @classmethod
    def decode_fixed(cls, data: bytes) -> tuple[int, int]:
        """Room and length of the reason that follows."""
        magic, version, _, room, length = _REPLY.unpack(data)
        if magic != MAGIC or version != VERSION or length > MAX_REASON_BYTES:
            raise ProtocolError("not a pdtrim reply")
        return room, length
