"""Which ranks hold and send which KV heads: every head reaches every rank that holds it, once."""

import itertools

import pytest

from pdtrim_deploy.plan.heads import held_heads, indivisible, sent_heads, source_ranks, unpairable

SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 32)
CASES = [
    (heads, prefill, decode)
    for heads, prefill, decode in itertools.product(SIZES, repeat=3)
    if not (indivisible(heads, prefill) or indivisible(heads, decode) or unpairable(prefill, decode))
]


def test_there_are_cases_of_each_kind():
    kinds = {(h >= p, h >= d, (p > d) - (p < d)) for h, p, d in CASES}
    assert len(kinds) == 8  # more prefill than decode ranks, fewer, as many; each with copies or not, as far as it goes


@pytest.mark.parametrize(("heads", "prefill", "decode"), CASES)
def test_a_rank_of_decode_gets_each_of_its_heads_once_from_a_rank_that_holds_it(heads, prefill, decode):
    for rank in range(decode):
        shares = sent_heads(heads, prefill, decode, rank)
        assert [head for share in shares.values() for head in share] == list(held_heads(heads, decode, rank))
        for source, share in shares.items():
            assert source in source_ranks(prefill, decode, rank)
            assert set(share) <= set(held_heads(heads, prefill, source))


@pytest.mark.parametrize(("heads", "prefill", "decode"), CASES)
def test_each_rank_of_prefill_has_a_partner(heads, prefill, decode):
    sources = [source_ranks(prefill, decode, rank) for rank in range(decode)]
    assert sorted({rank for ranks in sources for rank in ranks}) == list(range(prefill))
    assert len({len(ranks) for ranks in sources}) == 1


@pytest.mark.parametrize("ranks", SIZES)
@pytest.mark.parametrize("heads", SIZES)
def test_ranks_hold_all_heads_evenly(heads, ranks):
    if indivisible(heads, ranks):
        assert heads % ranks
        assert ranks % heads
        return
    held = [held_heads(heads, ranks, rank) for rank in range(ranks)]
    assert sorted(head for heads_of_rank in held for head in heads_of_rank) == sorted(
        list(range(heads)) * max(1, ranks // heads)
    )


def test_what_cannot_be_divided_is_named():
    assert indivisible(8, 3) == "8 KV heads can neither be divided among 3 ranks nor be copied to them evenly"
    assert "among 2 ranks in prefill, among 3 in decode" in unpairable(2, 3)
    assert indivisible(2, 8) == unpairable(4, 8) == unpairable(8, 4) == ""
