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
    split, options = decode.spec.options.split_pool, decode.spec.options
    assert isinstance(split, SplitPool)
    line = rf"pool for requests of {split.isl} \+ {split.osl} tokens: .*; ([\d.]+)% of one pool"
    share = re.search(line, decode.log.read_text())
    tokens, page = options.pool_tokens, options.page_tokens
    held, whole = (sum(split.slots(send, tokens, page) for send in sends) for sends in (kv, (KVSend(),) * len(kv)))
    assert share is not None
    assert float(share[1]) == pytest.approx(100 * held / whole, abs=0.5)
    # in whole pages, of which the last is half full: what plan says, and up to half a page a request and layer more
    planned, single = (
        request_bytes(mixed_bundle.plan.model, sends, split.isl, split.osl) for sends in (kv, (KVSend(),) * len(kv))
    )
    assert planned / single <= held / whole < planned / single + page / (split.isl + split.osl)
