"""A request's KV has arrived when every chunk was sent and acknowledged, the last one among them."""

import pytest
from pdtrim_sglang.progress import RoomProgress


@pytest.mark.parametrize(
    ("queued", "sent", "acknowledged", "last_sent", "complete"),
    [
        (2, 2, 2, 1.0, True),
        (3, 2, 2, 1.0, False),  # a part of the last chunk still waits in the queue
        (2, 2, 1, 1.0, False),
        (2, 1, 2, 1.0, False),
        (2, 2, 2, None, False),  # more chunks will come
    ],
)
def test_complete(queued, sent, acknowledged, last_sent, complete):
    progress = RoomProgress(queued=queued, sent=sent, acknowledged=acknowledged, last_sent=last_sent)
    assert progress.complete is complete
