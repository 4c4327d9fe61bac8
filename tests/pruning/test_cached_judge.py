"""Verdicts of a judge: asked for once, kept for the same judge and text alone."""

import pytest

from pdtrim_deploy.pruning.cached_judge import CachedJudge
from pdtrim_deploy.pruning.solution import NOTHING, Solution

FIRST, SECOND, THIRD = (Solution.of((block,)) for block in (1, 2, 3))


class Counting:
    def __init__(self):
        self.calls = []

    def __call__(self, stage, prefill, solutions):
        self.calls.append((stage, prefill, list(solutions)))
        return [len(self.calls) + solution.removed[0] / 10 for solution in solutions]


def test_each_is_asked_for_once_and_said_again_by_another_process(tmp_path):
    judge, file = Counting(), tmp_path / "reports" / "judged.jsonl"
    written = CachedJudge(judge, file, ["text", 1])
    assert written("prefill", NOTHING, [FIRST, SECOND]) == [1.1, 1.2]
    assert written("prefill", NOTHING, [SECOND, THIRD]) == [1.2, 2.3]
    assert written("decode", FIRST, [SECOND]) == [3.2]
    assert written("decode", THIRD, [SECOND]) == [4.2], "behind another prefill it is another question"
    assert written("decode", FIRST, [SECOND]) == [3.2]
    assert [solutions for _, _, solutions in judge.calls] == [[FIRST, SECOND], [THIRD], [SECOND], [SECOND]]
    again = CachedJudge(silent, file, ["text", 1])
    assert again("prefill", NOTHING, [THIRD, FIRST, SECOND]) == [2.3, 1.1, 1.2]
    assert again("decode", FIRST, [SECOND]) == [3.2]


def test_what_was_half_written_is_asked_again(tmp_path):
    file = tmp_path / "judged.jsonl"
    CachedJudge(Counting(), file, 1)("prefill", NOTHING, [FIRST, SECOND])
    file.write_bytes(file.read_bytes()[:-5])
    judge = Counting()
    assert CachedJudge(judge, file, 1)("prefill", NOTHING, [FIRST, SECOND]) == [1.1, 1.2]
    assert judge.calls == [("prefill", NOTHING, [SECOND])]


def test_verdicts_of_another_text_are_thrown_away(tmp_path):
    file, judge = tmp_path / "judged.jsonl", Counting()
    CachedJudge(Counting(), file, "text")("prefill", NOTHING, [FIRST])
    CachedJudge(judge, file, "other text")("prefill", NOTHING, [FIRST])
    assert len(judge.calls) == 1


def test_what_was_said_before_a_kill_is_kept(tmp_path):
    def killed(stage, prefill, solutions):
        yield 1.5
        raise KeyboardInterrupt

    file, judge = tmp_path / "judged.jsonl", Counting()
    with pytest.raises(KeyboardInterrupt):
        CachedJudge(killed, file, 1)("prefill", NOTHING, [FIRST, SECOND])
    assert CachedJudge(judge, file, 1)("prefill", NOTHING, [FIRST, SECOND]) == [1.5, 1.2]
    assert judge.calls == [("prefill", NOTHING, [SECOND])]


def silent(*_):
    raise AssertionError("asked again")
