"""What is kept of the harness's samples."""

import math

import pytest

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.evaluation.lm_harness.samples import joined, measured
from pdtrim_deploy.evaluation.recovery import Recovery


def sample(number: int, filter_name: str = "none", **metrics: object) -> dict[str, object]:
    return {"doc_id": number, "filter": filter_name, "metrics": list(metrics), **metrics}


def test_values_stand_in_the_order_of_the_questions() -> None:
    result = measured("t", [sample(1, acc=0.0, acc_norm=True), sample(0, acc=1.0, acc_norm=False)])
    assert result.values == {"acc": (1.0, 0.0), "acc_norm": (0.0, 1.0)}
    assert result.groups == ("all", "all")


def test_a_metric_of_several_filters_is_as_many_measures() -> None:
    rows = [sample(n, name, exact_match=float(n == k)) for k, name in enumerate(("strict", "loose")) for n in (0, 1)]
    assert measured("t", rows).values == {"exact_match,strict": (1.0, 0.0), "exact_match,loose": (0.0, 1.0)}


def test_perplexities_are_nats_a_unit_of_each_question() -> None:
    rows = [sample(0, word_perplexity=[-12.0, 4], bits_per_byte=[-12.0, 20]), sample(1, word_perplexity=[-9.0, 3])]
    rows[1]["bits_per_byte"] = [-9.0, 11]
    assert measured("t", rows).values == {"nll_word": (3.0, 3.0)}
    assert measured("t", rows).weights == {"nll_word": (4.0, 3.0)}
    assert measured("t", [sample(0, perplexity=-2.5)]).values == {"nll": (2.5,)}
    assert measured("t", [sample(0, perplexity=-2.5)]).weights == {}


def test_a_text_weighs_as_many_words_as_it_has() -> None:
    of_words = [(-12.0, 4), (-9.0, 1), (-6.0, 5)], [(-16.0, 4), (-9.5, 1), (-7.0, 5)]
    tasks = [[sample(n, word_perplexity=[*pair]) for n, pair in enumerate(pairs)] for pairs in of_words]
    dense, pd = (measured("t", rows) for rows in tasks)
    assert (dense.mean("nll_word"), pd.mean("nll_word")) == (27 / 10, 32.5 / 10)
    paired = pd.against(dense, "nll_word")
    strayed = [4 - 4 * 0.55, 0.5 - 0.55, 1 - 5 * 0.55]  # of each text's sum from what its words have on average
    stderr = (sum(x * x for x in strayed) * 3 / 2) ** 0.5 / 10
    assert (paired.mean, paired.stderr, paired.count) == (pytest.approx(0.55), pytest.approx(stderr), 3)
    kept = Recovery.of(dense, pd, {})
    assert kept.recovery == pytest.approx(math.exp(0.55))
    assert kept.stderr == pytest.approx(math.exp(0.55) * stderr)
    group = joined("g", {"a": dense, "b": measured("b", tasks[0][:1])})
    assert group.mean("nll_word") == 39 / 14


def test_an_empty_text_weighs_nothing() -> None:
    result = measured("t", [sample(0, byte_perplexity=[-12.0, 4]), sample(1, byte_perplexity=[0.0, 0])])
    assert (result.values, result.mean("nll_byte")) == ({"nll_byte": (3.0, 0.0)}, 3.0)


def test_the_direction_of_a_metric_is_kept_where_all_tasks_of_a_group_have_it() -> None:
    rows = [sample(0, "a", ter=1.0, perplexity=-1.0), sample(0, "b", ter=0.0)]
    result = measured("t", rows, {"ter": False, "perplexity": False, "f1": None})
    assert result.higher_is_better == {"ter,a": False, "ter,b": False}
    assert joined("g", {"t": result}).higher_is_better == result.higher_is_better
    first, second = (
        measured("t", [sample(0, x=1.0, y=1.0)], {"x": True, "y": direction}) for direction in (True, False)
    )
    assert joined("g", {"a": first, "b": second}).higher_is_better == {"x": True}


def test_a_task_without_a_number_for_each_question_is_refused() -> None:
    with pytest.raises(UserError, match="task t has no metric that is a number for each question"):
        measured("t", [sample(0, f1=[1, 0])])


def test_a_group_is_all_questions_of_its_tasks() -> None:
    tasks = {
        "a": measured("a", [sample(0, acc=1.0, acc_norm=0.0)]),
        "b": measured("b", [sample(n, acc=0.0) for n in (0, 1)]),
    }
    group = joined("lm_eval:g", tasks)
    assert (group.task, group.groups, group.values) == ("lm_eval:g", ("a", "b", "b"), {"acc": (1.0, 0.0, 0.0)})
    assert joined("lm_eval:a", {"a": tasks["a"]}).groups == ("all",)
    with pytest.raises(UserError, match="no measure in common; name them one by one: a, b"):
        joined("g", tasks | {"b": measured("b", [sample(0, f2=1.0)])})
