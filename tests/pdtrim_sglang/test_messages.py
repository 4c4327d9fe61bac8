"""Control messages: ours survive, anything else is None and never an exception."""

from hypothesis import given
from hypothesis import strategies as st
from pdtrim_sglang.messages import REGISTER, ROOM, Register, Room, parse

WHO = {"session": "127.0.0.1:5", "host": "127.0.0.1", "control_port": 5}


def test_ours_survive():
    register = Register(**WHO, protocol=1, digest="a" * 64, data_port=7, tp_size=1, tp_rank=0, aux_item_bytes=(4, 64))
    room = Room(**WHO, room=2**63 - 1, prompt_tokens=3, prefix_tokens=0, destinations=1)
    assert parse(register.frames()) == register
    assert parse(room.frames()) == room


@given(st.lists(st.one_of(st.binary(max_size=64), st.sampled_from([REGISTER, ROOM, b"{}", b"ABORT"])), max_size=4))
def test_anything_else_is_none(frames):
    assert parse(frames) is None


def test_an_oversized_message_is_not_even_parsed():
    assert parse([ROOM, b" " * 5000]) is None
