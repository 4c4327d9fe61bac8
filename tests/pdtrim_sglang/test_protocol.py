"""The frame format: every header survives the wire, every damage is noticed, garbage is refused."""

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pdtrim_sglang.protocol import HEADER_BYTES, REPLY_BYTES, ChunkHeader, ProtocolError, Reply, body_matches

U32 = st.integers(0, 2**32 - 1)


@st.composite
def headers(draw):
    start, stop, tokens = sorted(draw(st.tuples(U32, U32, U32)))
    return ChunkHeader(
        digest=draw(st.binary(min_size=32, max_size=32)),
        room=draw(st.integers(0, 2**63 - 1)),
        rank=draw(U32),
        prompt_tokens=tokens,
        start=start,
        stop=stop,
        reused_tokens=draw(st.integers(0, tokens)),
        aux_bytes=draw(U32),
        payload_bytes=draw(st.integers(0, 2**63 - 1)),
        last=draw(st.booleans()),
        heads=draw(st.integers(0, 99).map(lambda first: range(first, 2 * first + 1))),
    )


@given(headers(), st.binary(max_size=64), st.binary(max_size=64))
def test_a_header_survives_the_wire(header, payload, aux):
    body = (memoryview(payload), memoryview(aux))
    data = header.encode(body)
    assert len(data) == HEADER_BYTES
    assert ChunkHeader.decode(data) == header
    assert body_matches(data, body)


@given(headers(), st.binary(min_size=1, max_size=64), st.data())
def test_one_changed_bit_anywhere_breaks_the_checksum(header, payload, data):
    whole = bytearray(header.encode((memoryview(payload),)) + payload)
    bit = data.draw(st.integers(0, 8 * len(whole) - 1))
    whole[bit // 8] ^= 1 << (bit % 8)
    assert not body_matches(bytes(whole[:HEADER_BYTES]), (memoryview(whole)[HEADER_BYTES:],))


@given(st.binary(min_size=HEADER_BYTES, max_size=HEADER_BYTES))
def test_garbage_is_refused(data):
    with pytest.raises(ProtocolError):
        ChunkHeader.decode(data)


def test_another_version_is_named():
    header = ChunkHeader(bytes(32), 1, 0, 4, 0, 4, 0, 0, True, range(1))
    data = bytearray(header.encode(()))
    data[4] = 9
    with pytest.raises(ProtocolError, match="version 9"):
        ChunkHeader.decode(bytes(data))


def test_a_chunk_outside_its_prompt_is_refused():
    with pytest.raises(ProtocolError, match="does not lie"):
        ChunkHeader.decode(ChunkHeader(bytes(32), 1, 0, 4, 2, 5, 0, 0, True, range(1)).encode(()))


@given(st.integers(0, 2**63 - 1), st.text(max_size=100))
def test_a_reply_survives_the_wire(room, reason):
    data = Reply(room, reason).encode()
    got, length = Reply.decode_fixed(data[:REPLY_BYTES])
    assert (got, data[REPLY_BYTES:].decode()) == (room, reason)
    assert length == len(data) - REPLY_BYTES


def test_a_reply_of_another_version_is_refused():
    data = bytearray(Reply(7).encode())
    data[4] += 1
    with pytest.raises(ProtocolError, match="not a pdtrim reply"):
        Reply.decode_fixed(bytes(data))


def test_random_replies_are_refused():
    with pytest.raises(ProtocolError):
        Reply.decode_fixed(b"X" + os.urandom(REPLY_BYTES - 1))
