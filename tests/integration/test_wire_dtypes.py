"""The shared pair of all wire dtypes has them all, and decode's pool takes the memory of the arithmetic.

That it computes what the oracle says, and sends the bytes of the arithmetic: test_served_pair.py.
"""

import re

import pytest

from pdtrim_deploy.plan import KVSend
from pdtrim_deploy.plan.wire import WIRE_DTYPES
from pdtrim_deploy.worker.decode_pool import SplitPool, request_bytes

pytestmark = [pytest.mark.serve, pytest.mark.model, pytest.mark.timeout(900), pytest.mark.xdist_group("tiny bundle")]


def test_all_wire_dtypes_in_one_plan(mixed_bundle):
    kv = mixed_bundle.plan.kv
    assert {send.wire_dtype for send in kv} == set(WIRE_DTYPES)
    assert len({(send.n_first, send.n_last) for send in kv}) == 6


def test_decodes_pool_is_as_small_as_the_arithmetic_says(mixed_bundle, mixed_pair):
    kv, (_, decode) = mixed_bundle.plan.kv, mixed_pair.workers
    split = decode.spec.options.split_pool
    assert isinstance(split, SplitPool)
    line = rf"pool split for {split.isl} \+ {split.osl} tokens: .*; ([\d.]+)% of one pool"
    share = re.search(line, decode.log.read_text())
    whole = tuple(KVSend() for _ in kv)
    split_bytes, whole_bytes = (request_bytes(mixed_bundle.plan.model, kv, split.isl, split.osl) for kv in (kv, whole))
    assert share is not None
    assert float(share[1]) == pytest.approx(100 * split_bytes / whole_bytes, abs=1)
