"""Likelihoods and texts of both hand-overs behind a plan that cuts, against the oracle's own functions one by one."""

from __future__ import annotations

import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from tinypd import BLOCKS, SPARSE, make_oracle, make_plan, text, tiny

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.evaluation.lm_harness import generation, scoring
from pdtrim_deploy.evaluation.lm_harness.answers import Answers, halves
from pdtrim_deploy.evaluation.lm_harness.generation import TextRequest, texts
from pdtrim_deploy.evaluation.lm_harness.scoring import loglikelihoods
from pdtrim_deploy.models.layer_run import LayerRun
from pdtrim_deploy.models.oracle import PDOracle

CONTEXTS = [tuple(ids) for ids in (*text(3, 14).tolist(), *text(2, 11, seed=1).tolist())]
ANSWERS = [(5, 6, 7), (9,), (10, 11), (3, 1, 4, 1, 5)]
PAIRS = [(context, answer) for answer in ANSWERS for context in CONTEXTS[: 3 + len(answer) % 3]]
PAIRS += [((7,), (8, 9)), ((7,), (1,))]


def cut(family: str = "Qwen2") -> PDOracle:
    """Decode lacks a block and reads few rows of the prompt."""
    return make_oracle(tiny(family), make_plan(decode=(2,), kv=(SPARSE,) * (BLOCKS - 1)))


def by_hand(oracle: PDOracle, context: tuple[int, ...], answer: tuple[int, ...], hand_over: str) -> list[float]:
    """Log-probabilities by `PDOracle.logprobs`, whose first token is prefill's."""
    skip = 1 if hand_over == "decode" and len(context) > 1 else 0
    prompt, later = context[: len(context) - skip], context[len(context) - skip :] + answer
    return oracle.logprobs(torch.tensor(prompt), torch.tensor(later))[skip:].tolist()


@pytest.mark.parametrize("hand_over", ["served", "decode"])
@pytest.mark.parametrize("limits", [(8192, 2048), (40, 9), (1, 1)], ids=["whole", "small batches", "singles"])
def test_likelihoods_in_any_batch_are_those_taken_one_by_one(
    hand_over: str, limits: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scoring, "KV_TOKENS", limits[0])
    monkeypatch.setattr(scoring, "BRANCH_TOKENS", limits[1])
    oracle = cut()
    for pair, (total, _) in zip(PAIRS, loglikelihoods(oracle, PAIRS, hand_over), strict=True):
        assert total == pytest.approx(sum(by_hand(oracle, *pair, hand_over)), abs=1e-4)


class Letters:
    """One token a letter."""

    bos_token_id, eos_token_id, eos_token = 0, 0, "$"

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return [ord(letter) - 60 for letter in text]

    def decode(self, ids: list[int]) -> str:
        return "$"


def test_a_pass_over_a_long_window_reads_few_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    oracle, passes = cut(), []
    oracle.decode_model.config.max_position_embeddings = 64
    texts = ["abcdefghij" * 20, "klmno" * 7]  # windows of 64 tokens, whose halves decode reads
    expected = Answers(oracle, Letters(), None, print).loglikelihood_rolling(texts)
    monkeypatch.setattr(scoring, "KV_TOKENS", 24)
    monkeypatch.setattr(scoring, "BRANCH_TOKENS", 8)
    start = LayerRun.__init__

    def counted(self: LayerRun, runner: object, parts: list[torch.Tensor], *rest: int) -> None:
        passes.extend(ids.numel() for ids in parts if runner is oracle.decode)
        start(self, runner, parts, *rest)

    monkeypatch.setattr(LayerRun, "__init__", counted)
    totals = Answers(oracle, Letters(), None, print).loglikelihood_rolling(texts)
    assert totals == pytest.approx(expected, abs=1e-3)
    assert max(passes) <= 24
    assert sum(passes) >= 200


def test_an_answer_of_a_token_touches_decode_in_the_hand_over_decode_alone() -> None:
    pairs = [(context, (9,)) for context in CONTEXTS]
    dense, pruned = make_oracle(tiny("Qwen2"), make_plan()), cut()
    served = [loglikelihoods(oracle, pairs, "served") for oracle in (dense, pruned)]
    assert served[0] == served[1]
    decode = [loglikelihoods(oracle, pairs, "decode") for oracle in (dense, pruned)]
    assert [total for total, _ in decode[0]] == pytest.approx([total for total, _ in served[0]], abs=1e-4)
    assert all(abs(a - b) > 1e-2 for (a, _), (b, _) in zip(*decode, strict=True))


@pytest.mark.parametrize("hand_over", ["served", "decode"])
def test_the_greedy_text_is_known_as_such(hand_over: str) -> None:
    oracle, contexts = cut(), CONTEXTS[:3]
    likeliest = generated(oracle, [TextRequest(context, (), 4) for context in contexts], hand_over)
    pairs = [(context, tuple(ids)) for context, ids in zip(contexts, likeliest, strict=True)]
    assert [greedy for _, greedy in loglikelihoods(oracle, pairs, hand_over)] == [True] * 3
    changed = [(context, (*ids[:-1], (ids[-1] + 1) % 97)) for context, ids in pairs]
    assert [greedy for _, greedy in loglikelihoods(oracle, changed, hand_over)] == [False] * 3


class Words:
    """A tokenizer whose tokens are numbers with a point: stop strings may lie across two."""

    eos_token_id = None

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return "".join(f"{number}." for number in ids)


def generated(oracle: PDOracle, requests: list[TextRequest], hand_over: str) -> list[list[int]]:
    lines = texts(oracle, Words(), requests, hand_over)
    return [[int(word) for word in line.split(".") if word] for line in lines]


def greedy(oracle: PDOracle, context: tuple[int, ...], tokens: int, hand_over: str) -> list[int]:
    if hand_over == "served":
        return oracle.greedy(torch.tensor(context), tokens).tolist()
    ids: list[int] = []
    for _ in range(tokens):  # of all tokens, the likeliest behind what decode has read
        totals = [by_hand(oracle, context, (*ids, token), "decode")[-1] for token in range(97)]
        ids.append(max(range(97), key=totals.__getitem__))
    return ids


@pytest.mark.parametrize("hand_over", ["served", "decode"])
def test_texts_side_by_side_are_greedy_one_by_one(hand_over: str, monkeypatch: pytest.MonkeyPatch) -> None:
    oracle, tokens = cut(), 6 if hand_over == "served" else 3
    expected = [greedy(oracle, context, tokens, hand_over) for context in CONTEXTS]
    requests = [TextRequest(context, (), tokens) for context in CONTEXTS]
    assert generated(oracle, requests, hand_over) == expected
    monkeypatch.setattr(generation, "KV_TOKENS", 1)
    assert generated(oracle, requests, hand_over) == expected


def test_each_text_ends_by_itself() -> None:
    oracle, context = cut("Llama"), CONTEXTS[0]
    full = greedy(oracle, context, 8, "served")
    words = [f"{token}." for token in full]
    stop = f".{full[3]}"  # begins at the end of a token
    expected = "".join(words).split(stop)[0]
    requests = [TextRequest(context, (), 8), TextRequest(context, ("nowhere", stop), 8), TextRequest(context, (), 2)]
    assert texts(oracle, Words(), requests, "served") == ["".join(words), expected, "".join(words[:2])]
    assert 0 < len(expected) < len("".join(words))
    end = next(token for token in full[1:] if token != full[0])
    oracle.decode_model.config.eos_token_id = [end]
    assert texts(oracle, Words(), requests[:1], "served") == ["".join(words[: full.index(end)])]


class Marked(Words):
    """Its even tokens are special: a text without them has the odd ones alone."""

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return "".join(f"{number}." for number in ids if number % 2 or not skip_special_tokens)


def test_a_special_token_stops_a_text() -> None:
    request = TextRequest((1,), ("7.", " 4."), 9)
    for ids, expected in (((3, 4), "3."), ((3, 2, 7), "3."), ((3, 5, 8), "3.5.")):
        text = generation._Text(Marked(), replace(request, until=(f"{ids[-1]}.",)), ())
        for token in ids:
            assert not text.ended
            text.add(token)
        assert (text.text, text.ended) == (expected, True)


class Merging:
    """One token a letter, but `ab` is one: what stands at a border may merge."""

    bos_token_id, eos_token_id, eos_token = 0, 0, "$"

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return [99 if part == "ab" else ord(part) - 60 for part in re.findall("ab|.", text)]

    def decode(self, ids: list[int]) -> str:
        return "$"


def test_a_border_that_a_merge_crosses_is_the_harness_s() -> None:
    answers = Answers(cut(), Merging(), None, print)
    x, a, c = (ord(letter) - 60 for letter in "xac")
    assert answers._pair("xa", "bc") == ((x, a), (c,))  # x, ab, c has two tokens of context
    assert answers._pair("x", "ab") == ((x,), (99,))


def test_likelihoods_that_are_no_numbers_are_refused() -> None:
    oracle = cut()
    with torch.no_grad():
        oracle.prefill_model.get_input_embeddings().weight.fill_(float("nan"))
    with pytest.raises(UserError, match="1 of 1 likelihoods are not finite"):
        loglikelihoods(oracle, PAIRS[:1], "decode")


def test_ends_are_those_of_tokenizer_and_both_configs() -> None:
    model = SimpleNamespace(config=SimpleNamespace(eos_token_id=[3, 4]), generation_config=SimpleNamespace())
    assert generation.end_tokens(model, SimpleNamespace(eos_token_id=5)) == {3, 4, 5}
    model.generation_config.eos_token_id = 6
    model.config.eos_token_id = None
    assert generation.end_tokens(model, SimpleNamespace(eos_token_id=None)) == {6}


def test_halves_of_a_window_are_all_of_it() -> None:
    assert halves((1,), (2, 3, 4)) == [((1,), (2,)), ((1, 2), (3, 4))]
    assert halves((1,), (2,)) == [((1,), (2,))]
