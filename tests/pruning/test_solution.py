"""What a stage loses: said and read back."""

from hypothesis import given
from hypothesis import strategies as st

from pdtrim_deploy.pruning.solution import NOTHING, Solution


@st.composite
def solutions(draw):
    """Of 30 blocks: each stays, goes, or is the first of a pair."""
    removed, distilled, block = [], [], 0
    while block < 30:
        what = draw(st.sampled_from(("stays", "goes", "pair")))
        if what == "goes":
            removed.append(block)
        elif what == "pair" and block < 29:
            distilled.append(block)
            block += 1
        block += 1
    return Solution(tuple(removed), tuple(distilled))


@given(solutions())
def test_what_is_said_is_read_back(solution):
    assert Solution.read(str(solution)) == solution


def test_nothing_has_a_word():
    assert str(NOTHING) == "nothing"
    assert Solution.read("nothing") == NOTHING
