"""Ranks send each other the heads that SGLang's own transfer sends between stages of unlike tensor parallelism."""

import itertools

import pytest

pytest.importorskip("sglang", reason="needs the serve environment")
from sglang.srt.disaggregation.common.conn import CommonKVManager, PrefillServerInfo
from sglang.srt.disaggregation.common.staging_buffer import compute_head_slice_params

from pdtrim_deploy.plan.heads import held_heads, indivisible, sent_heads, source_ranks, unpairable

SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 32)
CASES = [
    (heads, prefill, decode)
    for heads, prefill, decode in itertools.product(SIZES, repeat=3)
    if not (indivisible(heads, prefill) or indivisible(heads, decode) or unpairable(prefill, decode))
]


@pytest.mark.parametrize(("heads", "prefill", "decode"), CASES)
def test_slices_are_those_of_sglang(heads, prefill, decode):
    """SGLang lets each copy of a head be sent to one place; here the first copy is."""
    for rank in range(decode):
        rank_heads, shares, places = held_heads(heads, decode, rank), sent_heads(heads, prefill, decode, rank), {}
        for source in source_ranks(prefill, decode, rank):
            start, count, place, _ = compute_head_slice_params(prefill, decode, source, rank, heads)
            first = held_heads(heads, prefill, source).start + start
            assert rank_heads.start + place == first
            if (place, count) in places.values():
                assert source not in shares
            else:
                assert shares[source] == range(first, first + count)
                places[source] = place, count
        assert list(places) == list(shares)


class Manager:
    """What SGLang's mapping of ranks reads of a decode worker with multi-head attention."""

    is_mla_backend = is_hybrid_mla_backend = enable_all_cp_ranks_for_transfer = False
    attn_cp_size, attn_cp_rank, pp_size, pp_rank = 1, 0, 1, 0

    def __init__(self, size, rank):
        self.attn_tp_size, self.kv_args = size, type("Args", (), {"engine_rank": rank})


@pytest.mark.parametrize(("heads", "prefill", "decode"), [case for case in CASES if case[0] == 8])
@pytest.mark.parametrize("group", [0, 3])
def test_ranks_speak_to_those_that_sglang_connects(heads, prefill, decode, group):
    """Of the `group`th data-parallel group of decode too, whose ranks SGLang counts through."""
    for rank in range(decode):
        info = PrefillServerInfo(
            attn_tp_size=prefill, attn_cp_size=1, dp_size=1, pp_size=1, page_size=1, kv_cache_dtype=None,
            follow_bootstrap_room=True,
        )  # fmt: skip
        CommonKVManager._resolve_rank_mapping(Manager(decode, group * decode + rank), info)
        assert info.target_tp_ranks == list(source_ranks(prefill, decode, rank))
        assert info.required_dst_info_num == max(1, decode // prefill)
        assert info.required_prefill_response_num == max(1, prefill // decode)
