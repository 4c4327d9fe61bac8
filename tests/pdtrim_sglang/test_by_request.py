"""What is known of requests, whose ids and rooms come again."""

import pytest

pytest.importorskip("sglang", reason="needs the serve environment")
from pdtrim_sglang.by_request import ByRequest
from pdtrim_sglang.request_pages import WaitingPages


def test_a_request_that_is_sent_again_stays_when_its_first_room_is_closed():
    known = ByRequest()
    known.put("a", 1, "first")
    known.put("a", 2, "second")
    assert (known.get("a"), known.of_room(1), known.of_room(2)) == ("second", None, "second")
    known.forget(1)
    assert (known.get("a"), known.of_room(2)) == ("second", "second")
    known.forget(2)
    assert (known.get("a"), known.of_room(2)) == (None, None)


def test_a_room_that_is_used_again_is_of_its_last_request():
    known = ByRequest()
    known.put("a", 1, "first")
    known.put("b", 1, "second")
    assert (known.get("a"), known.get("b"), known.of_room(1)) == (None, "second", "second")
    known.forget(1)
    known.forget(1)
    assert not known
    assert vars(known) == {"_values": {}, "_rids": {}}


def test_pages_of_a_request_that_was_sent_again_are_still_told_of_moves():
    waiting = WaitingPages()
    waiting.expect("a", 1)
    waiting.expect("a", 2)
    waiting.forget(1)
    assert waiting.add(2, 0, 4, [7]) is not None
