"""Verdicts of a judge: asked for once, kept for the same judge and text alone."""

import pytest

from pdtrim_deploy.pruning.cached_judge import CachedJudge
from pdtrim_deploy.pruning.solution import NOTHING, Solution

ONE, TWO, THREE = (Solution.of((block,)) for block in (1, 2, 3))


class Counting:
    def __init__(self):
        self.asked = []

    def __call__(self, stage, prefill, solutions):
        self.asked.append((stage, prefill, list(solutions)))
        return [len(self.asked) + one.removed[0] / 10 for one in solutions]


def test_each_is_asked_for_once_and_said_again_by_another_process(tmp_path):
    judge, file = Counting(), tmp_path / "reports" / "judged.jsonl"
    written = CachedJudge(judge, file, ["text", 1])
    assert written("prefill", NOTHING, [ONE, TWO]) == [1.1, 1.2]
    assert written("prefill", NOTHING, [TWO, THREE]) == [1.2, 2.3]
    assert written("decode", ONE, [TWO]) == [3.2]
    assert written("decode", THREE, [TWO]) == [4.2], "behind another prefill it is another question"
    assert written("decode", ONE, [TWO]) == [3.2]
    assert [solutions for _, _, solutions in judge.asked] == [[ONE, TWO], [THREE], [TWO], [TWO]]
    again = CachedJudge(silent, file, ["text", 1])
    assert again("prefill", NOTHING, [THREE, ONE, TWO]) == [2.3, 1.1, 1.2]
    assert again("decode", ONE, [TWO]) == [3.2]


def test_what_was_half_written_is_asked_again(tmp_path):
    file = tmp_path / "judged.jsonl"
    CachedJudge(Counting(), file, 1)("prefill", NOTHING, [ONE, TWO])
    file.write_bytes(file.read_bytes()[:-5])
    judge = Counting()
    assert CachedJudge(judge, file, 1)("prefill", NOTHING, [ONE, TWO]) == [1.1, 1.2]
    assert judge.asked == [("prefill", NOTHING, [TWO])]


def test_verdicts_of_another_text_are_thrown_away(tmp_path):
    file, judge = tmp_path / "judged.jsonl", Counting()
    CachedJudge(Counting(), file, "text")("prefill", NOTHING, [ONE])
    CachedJudge(judge, file, "other text")("prefill", NOTHING, [ONE])
    assert len(judge.asked) == 1


def test_what_was_said_before_a_kill_is_kept(tmp_path):
    def killed(stage, prefill, solutions):
        yield 1.5
        raise KeyboardInterrupt

    file, judge = tmp_path / "judged.jsonl", Counting()
    with pytest.raises(KeyboardInterrupt):
        CachedJudge(killed, file, 1)("prefill", NOTHING, [ONE, TWO])
    assert CachedJudge(judge, file, 1)("prefill", NOTHING, [ONE, TWO]) == [1.5, 1.2]
    assert judge.asked == [("prefill", NOTHING, [TWO])]


def silent(*_):
    raise AssertionError("asked again")
