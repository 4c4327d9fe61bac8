"""The shared pair of all wire dtypes has them all, and decode's pool takes the memory of the arithmetic.

That it computes what the oracle says, and sends the bytes of the arithmetic: test_served_pair.py.
"""

import json
import re

import pytest

from pdtrim_deploy.plan import STAGES, KVSend
from pdtrim_deploy.plan.wire import WIRE_DTYPES
from pdtrim_deploy.worker.decode_pool import SplitPool, request_bytes

pytestmark = [pytest.mark.serve, pytest.mark.model, pytest.mark.timeout(900), pytest.mark.xdist_group("tiny bundle")]


def test_all_wire_dtypes_and_scaled_rope_in_one_bundle(mixed_bundle):
    """Its rotation is Llama 3.1's: what test_served_pair.py compares with the oracle lies past its first context."""
    kv = mixed_bundle.plan.kv
    for stage in STAGES:
        rope = json.loads((mixed_bundle.stage_dir(stage) / "config.json").read_text())["rope_parameters"]
        assert (rope["rope_type"], rope["original_max_position_embeddings"]) == ("llama3", 64)
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
