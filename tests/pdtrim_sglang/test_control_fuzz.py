"""Whatever a control message holds: no exception, no peer, no room, and no success that was not delivered."""

import threading
from types import SimpleNamespace

import pytest

pytest.importorskip("sglang", reason="needs the serve environment")
from hypothesis import given, settings
from hypothesis import strategies as st
from pdtrim_sglang.control import MOST_MESSAGE_BYTES
from pdtrim_sglang.decode import DecodeSide
from pdtrim_sglang.manager import PDTrimKVManager
from pdtrim_sglang.messages import REGISTER, ROOM, Register, Room
from pdtrim_sglang.pairing import Ranks
from pdtrim_sglang.prefill import PrefillSide
from pdtrim_sglang.prefill_rooms import PrefillRooms
from pdtrim_sglang.progress import RoomProgress
from pdtrim_sglang.protocol import VERSION
from pdtrim_sglang.request_pages import WaitingPages
from pdtrim_sglang.rooms import AuxRows
from pdtrim_sglang.sessions import Sessions
from sglang.srt.disaggregation.base.conn import KVPoll
from sglang.srt.disaggregation.common.conn import ABORT_TAG

from pdtrim_deploy.plan import ModelShape, PDPlan

STATUS = PDTrimKVManager.kv_status_msg_tag
PLAN = PDPlan.dense(
    ModelShape(architecture="X", fingerprint="f", num_blocks=1, num_kv_heads=1, head_dim=8, kv_dtype="float32")
)
WHO = {"session": "127.0.0.1:5", "host": "127.0.0.1", "control_port": 5}
REGISTERED = Register(
    **WHO, protocol=VERSION, digest=PLAN.digest, data_port=7, tp_size=1, tp_rank=0, aux_item_bytes=()
)  # fmt: skip
FRAME = st.one_of(
    st.binary(max_size=40),
    st.sampled_from([REGISTER, ROOM, ABORT_TAG, STATUS, b"", b"{}", b"-1", b"\xff"]),
    st.integers(-1, 2**64).map(lambda n: str(n).encode()),
    st.integers(0, 9).map(lambda n: str(n).encode()),
)
FRAMES = st.lists(FRAME, min_size=1, max_size=6)


class Manager:
    """What both sides touch of theirs, kept for inspection."""

    kv_status_msg_tag = STATUS
    parse_kv_status_message = PDTrimKVManager.parse_kv_status_message
    attn_tp_size, attn_tp_rank, bootstrap_timeout = 1, 0, 60

    def __init__(self):
        self.failure_records = {}
        self.applied, self.request_status, self.transfer_infos, self.req_to_decode_prefix_len = [], {}, {}, {}

    def apply_prefill_status(self, **update):
        self.applied.append(update)

    def update_status(self, room, status):
        self.request_status[room] = status

    def conclude_failure(self, bootstrap_room, failure_reason):
        self.request_status[bootstrap_room] = KVPoll.Failed


class Bookkeeping(PDTrimKVManager):
    """SGLang's own tables of rooms."""

    def __init__(self):
        self.request_status, self.transfer_infos, self.req_to_decode_prefix_len = {}, {}, {}
        self.failure_records, self.failure_lock = {}, threading.Lock()
        self._deferred_ack_targets, self._deferred_ack_poisoned_rooms, self._staging_outstanding = {}, set(), {}
        self.bootstrap_timeout, self.message = 60, []

    def send_kv_status_message(self, **message):
        self.message.append(message)


class Metrics:
    """Counts what ended and how."""

    def __init__(self):
        self.outcomes, self.sizes = [], []

    def ended(self, outcome):
        self.outcomes.append(outcome)

    def succeeded(self, progress, *sizes):
        self.sizes.extend(sizes)

    def held(self, count):
        count()


def make_peer(_):
    raise RuntimeError("nobody is to be connected to")


def prefill(manager, plan=PLAN, draft_token_bytes=0):
    side = object.__new__(PrefillSide)
    side._manager, side._plan, side._aux, side._ranks = manager, plan, AuxRows((), ()), Ranks(1, 0, 1)
    side.sessions, side._pool, side._waiting = Sessions(make_peer), SimpleNamespace(draft=None), WaitingPages()
    side.rooms = PrefillRooms(manager, plan, Metrics(), side._held, draft_token_bytes)
    return side


def registered(side, peer=None):
    """`side`, to which decode has registered; no connection is made."""
    side.sessions._known[WHO["session"]] = REGISTERED
    side.sessions._peers[WHO["session"]] = peer or SimpleNamespace(forget=lambda _: None)
    return side


@settings(max_examples=200, deadline=None)
@given(FRAMES)
def test_decode_believes_failures_only(frames):
    manager = Manager()
    side = object.__new__(DecodeSide)
    side._manager = manager
    side._handle(frames)
    assert all(update["status"] in (KVPoll.Failed, KVPoll.WaitingForInput) for update in manager.applied)


def test_decode_hears_a_failure_and_no_success():
    manager = Manager()
    side = object.__new__(DecodeSide)
    side._manager = manager
    for status in (KVPoll.Success, KVPoll.Failed):
        side._handle([STATUS, b"7", str(status).encode(), b"0", b"why"])
    assert [(update["bootstrap_room"], update["status"], update["failure_reason"]) for update in manager.applied] == [
        (7, KVPoll.Failed, "why")
    ]


@settings(max_examples=200, deadline=None)
@given(FRAMES)
def test_prefill_opens_nothing(frames):
    manager = Manager()
    side = prefill(manager)
    side._handle(frames)
    assert not side.sessions._known
    assert all(status == KVPoll.Failed for status in manager.request_status.values())


@given(
    st.fixed_dictionaries(
        {
            "room": st.integers(0, 2**64 - 1),
            "prompt_tokens": st.integers(1, 2**40),
            "prefix_tokens": st.integers(0, 2**40),
            "destinations": st.integers(1, 2**40),
        }
    )
)
def test_a_room_of_an_unregistered_worker_fails_at_once(fields):
    manager = Manager()
    side = prefill(manager)
    side._handle(Room(**WHO, **fields).frames())
    assert manager.request_status == {fields["room"]: KVPoll.Failed}


def test_another_plan_makes_no_peer():
    side = prefill(Manager())
    message = Register(**WHO, protocol=VERSION, digest="0" * 64, data_port=7, tp_size=1, tp_rank=0, aux_item_bytes=())
    side._handle(message.frames())
    assert not side.sessions._known
    assert "plans differ" in side.sessions._rejected[message.session]


def test_decode_does_not_wait_for_a_request_that_prefill_has_given_up():
    """Prefill's deadline may pass while decode's pool is full: SGLang's decode then waits for its own, minutes."""
    side = registered(prefill(Manager()))
    message = Room(**WHO, room=7, prompt_tokens=3, prefix_tokens=0, destinations=1)
    side.sender_opened(7)
    side.sender_closed(7, opened=False)
    side._handle(message.frames())
    assert side._manager.request_status[7] == KVPoll.Failed
    side._manager.request_status.clear()
    side.sender_opened(7)  # asked for again
    side._handle(message.frames())
    assert side._manager.request_status[7] == KVPoll.WaitingForInput
    side._manager.request_status.clear()
    side.sender_closed(7, opened=True)  # retracted: it may come back
    side._handle(message.frames())
    assert side._manager.request_status[7] == KVPoll.WaitingForInput


def test_nothing_is_kept_of_a_prompt_that_is_aborted_between_its_chunks():
    """SGLang then aborts the sender and never clears it."""
    forgotten = []
    side = registered(prefill(Manager()), SimpleNamespace(forget=forgotten.append))
    side._manager.bootstrap_timeout = -1
    side.sender_opened(7)
    side._manager.req_to_decode_prefix_len[7] = 0
    side._manager.request_status[7], side._manager.failure_records[7] = KVPoll.Failed, "Aborted"
    side.sender_aborted(7, opened=True)
    assert not side.rooms._progress
    assert not side.rooms._senders
    assert not side._manager.request_status
    assert not side._manager.failure_records
    assert not side._manager.req_to_decode_prefix_len
    assert forgotten == [7]


def test_decode_hears_of_a_failure_that_came_before_its_room():
    """By an abort or a deadline; SGLang's own bookkeeping then keeps what comes after it quiet."""
    manager = Bookkeeping()
    side = registered(prefill(manager))
    for room in (7, 8):
        side.sender_opened(room)
        manager.update_status(room, KVPoll.Bootstrapping)
        manager.record_failure(room, "Aborted by AbortReq.")
        manager.update_status(room, KVPoll.Failed)
    side.sender_aborted(7, opened=False)  # 8: its scheduler has not come to it yet
    for room in (7, 8):
        side._handle(Room(**WHO, room=room, prompt_tokens=3, prefix_tokens=0, destinations=1).frames())
    assert manager.message == [
        {
            "targets": [("127.0.0.1", 5)], "bootstrap_room": room, "status": KVPoll.Failed,
            "failure_reason": "Aborted by AbortReq.",
        }
        for room in (7, 8)
    ]  # fmt: skip


def test_a_rank_counts_what_its_own_heads_would_have_sent():
    """The ranks' counters add up, as their payloads do."""
    plan = PDPlan.dense(PLAN.model.model_copy(update={"num_kv_heads": 4}))
    side = prefill(Manager(), plan)
    side.rooms._progress[7] = RoomProgress(prompt_tokens=3, reused_tokens=1)
    side._manager.transfer_infos[7] = {"s": SimpleNamespace(heads=range(1, 2))}
    side._manager.conclude_transfer = lambda **_: None
    side._manager.request_status[7] = KVPoll.WaitingForInput
    side.rooms.arrived(7)
    assert side.rooms._metrics.sizes == [plan.payload_bytes(2) // 4, plan.payload_bytes(1) // 4]


@pytest.mark.parametrize("reused", [0, 2, 3])
def test_a_drafts_rows_that_decode_had_are_counted_also_if_it_had_all(reused):
    side = prefill(Manager(), PDPlan.dense(PLAN.model), draft_token_bytes=100)
    side.rooms._progress[7] = RoomProgress(prompt_tokens=3, reused_tokens=reused, draft_bytes=100 * (3 - reused))
    side._manager.transfer_infos[7] = {"s": SimpleNamespace(heads=range(PLAN.model.num_kv_heads))}
    side._manager.conclude_transfer = lambda **_: None
    side._manager.request_status[7] = KVPoll.WaitingForInput
    side.rooms.arrived(7)
    plan = side._plan
    spared = plan.payload_bytes(reused) + 100 * reused if reused else 0
    assert side.rooms._metrics.sizes == [plan.dense_bytes(3 - reused) + 100 * (3 - reused), spared]


def test_a_long_reason_passes_the_control_channel_too():
    """Its messages are bounded: of a longer one decode would hear nothing, and wait for its own deadline."""
    manager, reasons = Manager(), []
    side = prefill(manager)
    manager.conclude_failure = lambda bootstrap_room, failure_reason: reasons.append(failure_reason)
    manager.request_status[7] = KVPoll.WaitingForInput
    side.rooms.fail(7, "packing failed: " + "\u00e9" * MOST_MESSAGE_BYTES)
    assert reasons[0].startswith("packing failed: \u00e9")
    assert len(reasons[0].encode()) < MOST_MESSAGE_BYTES


@pytest.mark.parametrize("first", ["prefill", "decode"])
def test_a_request_that_its_client_gives_up_is_aborted_whoever_hears_of_it_first(first):
    from pdtrim_sglang.sender import PDTrimKVSender
    from sglang.srt.observability.trace import TraceNullContext

    manager = Manager()
    manager.prefill_side = side = prefill(manager)
    manager.deferred_bootstrap, manager.record_failure = None, lambda *_: None
    side.sender_opened(7)
    manager.request_status[7] = KVPoll.WaitingForInput
    if first == "decode":
        side._handle([ABORT_TAG, b"7"])
    sender = object.__new__(PDTrimKVSender)
    sender.kv_mgr, sender.bootstrap_room, sender.trace_ctx = manager, 7, TraceNullContext()
    sender.abort()
    assert side.rooms._metrics.outcomes == ["aborted"]


@pytest.mark.parametrize(("prefix", "status", "start"), [(3, KVPoll.WaitingForInput, 3), (4, KVPoll.Failed, 0)])
def test_a_prompt_that_is_shorter_than_what_decode_has_of_it_fails_and_hangs_nobody(prefix, status, start):
    """As where one worker truncates prompts: SGLang would hand over no chunk, and hold the request's pages for ever."""
    from pdtrim_sglang.sender import PDTrimKVSender

    manager = Manager()
    manager.prefill_side = side = registered(prefill(manager))
    side.sender_opened(7)
    side._handle(Room(**WHO, room=7, prompt_tokens=9, prefix_tokens=prefix, destinations=1).frames())
    sender = object.__new__(PDTrimKVSender)
    sender.kv_mgr, sender.bootstrap_room, sender.prompt_tokens = manager, 7, 3
    assert sender.pop_decode_prefix_len() == start
    assert manager.request_status[7] == status


def announced(prompt_tokens):
    return Room(**WHO, room=7, prompt_tokens=prompt_tokens, prefix_tokens=0, destinations=1).frames()


@pytest.fixture
def arrived():
    """A request of 3 tokens whose rows decode has: its side, and its sender, which the scheduler has not closed yet."""
    from pdtrim_sglang.sender import PDTrimKVSender

    manager = Bookkeeping()
    manager.prefill_side = side = registered(prefill(manager))
    sender = object.__new__(PDTrimKVSender)
    sender.kv_mgr, sender.bootstrap_room, sender.conclude_state = manager, 7, None
    side.sender_opened(7)
    manager.update_status(7, KVPoll.Bootstrapping)
    side._handle(announced(3))
    assert manager.request_status[7] == KVPoll.WaitingForInput
    side.rooms.progress(7).last_sent = 1.0
    return side, sender


@pytest.mark.parametrize("heard", [True, False], ids=["reply came", "reply on its way"])
def test_a_request_that_decode_retracts_before_its_sender_is_closed_is_waited_for_again(arrived, heard):
    """The scheduler closes it after its forward pass, and all that SGLang knows of the room goes with it."""
    side, sender = arrived
    if heard:
        side._manager.update_status(7, KVPoll.Success)
    side._handle(announced(5))
    sender.clear()
    assert side._manager.request_status == {7: KVPoll.WaitingForInput}
    assert [info.prompt_tokens for info in side._manager.transfer_infos[7].values()] == [5]
    assert side._manager.req_to_decode_prefix_len == {7: 0}


def test_a_retracted_request_that_is_then_given_up_leaves_nothing_behind(arrived):
    side, sender = arrived
    side._manager.update_status(7, KVPoll.Success)
    side._handle(announced(5))
    side._handle([ABORT_TAG, b"7"])
    sender.clear()
    assert not side._manager.request_status
    assert not side._manager.transfer_infos
