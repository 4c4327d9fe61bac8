"""Malformed messages to the live ports, from strangers and from a member gone mad: nothing else is disturbed."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import strangers
from client import draw, send
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from stand import DEADLINE_S

pytestmark = [pytest.mark.serve, pytest.mark.timeout(900)]
MESSAGES = 200
FUZZ = settings(
    max_examples=MESSAGES // 4, deadline=None, database=None, suppress_health_check=list(HealthCheck), derandomize=True
)


def test_two_hundred_malformed_messages(stand):
    from pdtrim_sglang.secret import derive

    prefill, decode = stand.worker("prefill"), stand.worker("decode")
    bootstrap, transport = prefill.spec.bootstrap_port, decode.spec.transport["port"]
    control = {stage: strangers.zmq_ports(stand.worker(stage).pid) for stage in ("prefill", "decode")}
    assert control["prefill"]
    assert control["decode"]
    own_heads = stand.oracle.plan.model.num_kv_heads // stand.path.tp_decode
    plan, secret = stand.oracle.plan, stand.cluster.secret.read_bytes().strip()
    key, digest = derive(secret, b"transport"), bytes.fromhex(plan.digest)
    sign = strangers.signature(derive(secret, b"bootstrap"), digest)
    counted, answers = dict.fromkeys(("bootstrap", "control", "transport", "member"), 0), []

    @FUZZ
    @given(strangers.HTTP, st.sampled_from([None, sign]))
    def to_bootstrap(message, signs):
        counted["bootstrap"] += 1
        route, body = message
        status = strangers.to_bootstrap(bootstrap, route, body, signs)
        assert status < 500, f"{route} {body!r} was not understood to be malformed"
        assert status >= 400 or not route.startswith("PUT"), f"{route} {body!r} was believed"

    @FUZZ
    @given(st.sampled_from([*control["prefill"], *control["decode"]]), strangers.RAW)
    def to_control(port, data):
        counted["control"] += 1
        strangers.to_port(port, data)

    @FUZZ
    @given(strangers.RAW)
    def to_transport(data):
        counted["transport"] += 1
        strangers.to_port(transport, data)

    @FUZZ
    @given(strangers.FRAME)
    @example(strangers.Chunk(strangers.VERSION, 0, 0, None, 1, [0, 8, 8], 0, 1, True))
    @example(strangers.Chunk(strangers.VERSION, 0, 0, None, 1, [0, 8, 8], 0, None, False))
    @example(strangers.Chunk(strangers.VERSION, 0, 0, None, 1, [0, 8, 8], 0, None, True))
    def of_a_member(frame):
        counted["member"] += 1
        data = frame if isinstance(frame, bytes) else frame.encode(plan, own_heads, checksum)
        let_in, answer = strangers.as_member(transport, key, digest, data)
        assert let_in
        answers.append(answer)

    def all_of_it():
        for fuzz in (to_bootstrap, to_control, to_transport, of_a_member):
            fuzz()

    with strangers.checksums(stand.cluster.environment.python) as checksum, ThreadPoolExecutor(1) as other:
        load = other.submit(send, stand.url, draw(24, (2, 400), (8, 20), seed=13), DEADLINE_S)
        all_of_it()  # meanwhile
        ended = load.result()
    ended += send(stand.url, draw(12, (2, 400), (2, 12), seed=14), DEADLINE_S)
    row = stand.verdict(f"{sum(counted.values())} malformed messages to the live ports", ended)
    assert row.answered == row.sent
    assert sum(counted.values()) >= MESSAGES
    for depth in (b"the plan says", b"checksum mismatch", b"the request has ended"):  # lengths, bodies and rooms
        assert any(depth in answer for answer in answers), depth
    assert stand.health("prefill")
    assert stand.health("decode")
