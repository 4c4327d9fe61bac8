"""Rules of form: each checker on a text that keeps its rule and on one that breaks it; every question can be kept."""

from __future__ import annotations

from typing import Any

import pytest

from pdtrim_deploy.evaluation.generated.base import Setting
from pdtrim_deploy.evaluation.generated.checkers import CHECKERS, keeps
from pdtrim_deploy.evaluation.generated.instructions import load, right
from pdtrim_deploy.local.cache import Cache


@pytest.mark.parametrize(
    ("rule", "keeping", "breaking"),
    [
        (("words_at_least", 3), "It's one-two.", "It's one."),
        (("words_at_most", 2), "don't stop", "do not stop"),
        (("includes", "oven", 2), "Oven, oven.", "oven ovens"),
        (("excludes", "oven"), "the ovens", "The OVEN."),
        (("bullets", 2), "So:\n* a\n  - b", "* a\n*b\n**c**"),
        (("bullets", 1), "- a", "- a\n- b"),
        (("paragraphs", 2), "a\nb\n \nc\n", "a\nb"),
        (("lower",), "all 3 small", "All small"),
        (("upper",), "ALL 3 BIG", "ALL big"),
        (("lower",), "ok", "123"),
        (("json_keys", "a", "b"), '```json\n{"b": 1, "a": []}\n```', 'Here: {"a": 1, "b": 2}'),
        (("json_keys", "a"), ' {"a": null} ', '{"a": 1, "b": 2}'),
        (("json_keys", "a"), '{"a": "\u00e9"}', '["a"]'),
        (("ends", "That is all."), "So. That is all.\n", "That is all. So."),
        (("no_commas",), "a; b", "a, b"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_a_checker_tells_texts_apart(rule: tuple[Any, ...], keeping: str, breaking: str) -> None:
    assert keeps([rule], keeping)
    assert not keeps([rule], breaking)


def test_all_rules_count_and_an_empty_text_keeps_none() -> None:
    assert keeps([("words_at_most", 3), ("lower",)], "a b c")
    assert not keeps([("words_at_most", 3), ("lower",)], "a B c")
    assert not keeps([("no_commas",)], " \n")


def test_every_instruction_names_what_its_checker_wants(cache: Cache) -> None:
    questions = load(Setting(cache)).questions
    assert {rule[0] for question in questions for rule in question.check} == {*CHECKERS}
    assert {question.group for question in questions[:12]} == {question.group for question in questions}
    for question in questions:
        for name, *arguments in question.check:
            for argument in arguments[:1]:
                assert str(argument) in question.problem, (question.id, name)
        assert not right(question, "")


def test_a_plain_text_keeps_some_instructions_and_breaks_others(cache: Cache) -> None:
    text = "The first thing, as ever, is patience and a good oven that is hot."
    kept = {question.group for question in load(Setting(cache)).questions if right(question, text)}
    assert kept == {"short", "forbidden"}
