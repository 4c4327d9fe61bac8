"""What hands out shared pairs starts each once, keeps few, and ends them all (with stand-ins for clusters)."""

import contextlib
from pathlib import Path

import pytest
from shared_pairs import SharedPairs

from pdtrim_deploy.errors import ServingError
from pdtrim_deploy.worker.decode_pool import SplitPool


class Pair:
    dead = False

    def check(self):
        if self.dead:
            raise ServingError("decode-0 ended")


@pytest.fixture
def log():
    return []


@pytest.fixture
def pairs(log):
    @contextlib.contextmanager
    def start(prefill, decode, **options):
        log.append(f"start {prefill} {options.get('page_size', 1)}")
        yield Pair()
        log.append(f"stop {prefill} {options.get('page_size', 1)}")

    with contextlib.closing(SharedPairs(start, most=2)) as pairs:
        yield pairs


def test_equal_needs_share_a_pair_and_others_do_not(pairs, log):
    a = Path("a")
    first = pairs.get(a, a, page_size=16, split_pool=SplitPool(isl=4, osl=1))
    assert pairs.get(a, a, split_pool=SplitPool(isl=4, osl=1), page_size=16) is first
    assert pairs.get(a, a, page_size=16, split_pool=SplitPool(isl=4, osl=2)) is not first
    assert log == ["start a 16", "start a 16"]


def test_the_one_asked_for_longest_ago_ends_first(pairs, log):
    a, b, c = map(Path, "abc")
    for folder in (a, b, a, c):
        pairs.get(folder, folder)
    assert log == ["start a 1", "start b 1", "stop b 1", "start c 1"]
    pairs.close()
    assert log[4:] == ["stop a 1", "stop c 1"]


def test_a_pair_that_another_test_broke_is_not_handed_out(pairs):
    pairs.get(Path("a"), Path("a")).dead = True
    with pytest.raises(ServingError, match="decode-0 ended"):
        pairs.get(Path("a"), Path("a"))


def test_a_pair_of_ones_own_is_never_handed_out_and_has_the_memory(pairs, log):
    a = Path("a")
    shared = pairs.get(a, a)
    with pairs.unshared(a, a) as unshared:
        assert unshared is not shared
        assert log == ["start a 1", "stop a 1", "start a 1"]
        assert pairs.get(a, a) not in (unshared, shared)
