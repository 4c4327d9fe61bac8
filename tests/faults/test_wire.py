"""What a network does to the transport's bytes: requests fail with a sentence or are answered rightly, none hangs."""

import pytest
from client import draw, send
from stand import DEADLINE_S, STALL_S

pytestmark = [pytest.mark.serve, pytest.mark.timeout(900)]
LOAD = {"tokens": (2, 400), "new_tokens": (2, 12)}


@pytest.mark.parametrize("fault", ["delay", "corrupt", "truncate", "cut", "hole", "drop"])
def test_bytes(stand, fault):
    with stand.proxy.doing(fault):
        ended = send(stand.url, draw(16, seed=3, **LOAD), DEADLINE_S)
        hits = stand.proxy.hits
    row = stand.verdict(f"transport bytes: {fault}", ended)
    assert hits, "the fault did not happen"
    if fault == "delay":
        assert row.answered == row.sent
    else:
        assert row.failed, "the fault was not noticed"
        assert row.slowest_s < 8 * STALL_S
