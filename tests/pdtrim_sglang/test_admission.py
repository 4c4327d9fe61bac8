"""Lengths that are not the plan's are refused before a byte of a chunk's body is read."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from pdtrim_sglang.decode import DecodeSide
from pdtrim_sglang.pool import PoolView
from pdtrim_sglang.protocol import ChunkHeader, ProtocolError

from pdtrim_deploy.plan import ModelShape, PDPlan

TOKENS, AUX_BYTES = 5, 12
SHAPE = ModelShape(architecture="X", fingerprint="f", num_blocks=2, num_kv_heads=1, head_dim=4, kv_dtype="float32")
PLAN = PDPlan.dense(SHAPE)
PAYLOAD_BYTES = PLAN.payload_bytes(TOKENS)
GOOD = ChunkHeader(bytes.fromhex(PLAN.digest), 5, 0, TOKENS, 0, TOKENS, AUX_BYTES, PAYLOAD_BYTES, True, range(1))


@pytest.fixture
def side():
    rows = [torch.zeros(8, 1, 4) for _ in range(2)]
    side = object.__new__(DecodeSide)
    side._plan, side._digest, side._pool = PLAN, bytes.fromhex(PLAN.digest), PoolView(rows, rows, 1)
    side._aux, side._config = SimpleNamespace(total_bytes=AUX_BYTES), SimpleNamespace(staging_bytes=PAYLOAD_BYTES)
    return side


def test_the_plans_lengths_are_admitted(side):
    side.admit(GOOD)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"digest": bytes(32)}, "this worker serves"),
        ({"reused_tokens": 2}, rf"chunk of {PAYLOAD_BYTES} \+ 12 bytes, the plan says {PAYLOAD_BYTES * 3 // 5} \+ 12"),
        ({"aux_bytes": AUX_BYTES + 1}, rf"{PAYLOAD_BYTES} \+ 13 bytes, the plan says {PAYLOAD_BYTES} \+ 12"),
        ({"heads": range(1, 2)}, "chunk of KV heads 1 to 1, this rank has 0 to 0"),
        ({"heads": range(2)}, "chunk of KV heads 0 to 1, this rank has 0 to 0"),
        ({"heads": range(0)}, "chunk of KV heads 0 to -1"),
        ({"last": False}, rf"the plan says {PAYLOAD_BYTES} \+ 0"),
        ({"payload_bytes": PAYLOAD_BYTES - 4}, rf"chunk of {PAYLOAD_BYTES - 4} \+ 12"),
        ({"prompt_tokens": 9}, "a prompt of 9 tokens does not fit"),
    ],
)
def test_others_are_refused(side, changes, sentence):
    with pytest.raises(ProtocolError, match=sentence):
        side.admit(replace(GOOD, **changes))


def test_a_chunk_larger_than_the_staging_buffer_is_refused(side):
    side._config.staging_bytes -= 1
    with pytest.raises(ProtocolError, match="larger than the staging buffer"):
        side.admit(GOOD)
