"""A build whose decode is calibrated on the dense model's own words: what they are, kept, resumed, and refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tinytext import write_words

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.evaluation import corpora
from pdtrim_deploy.local.cache import Cache
from pdtrim_deploy.local.compute import Compute
from pdtrim_deploy.models import resolve
from pdtrim_deploy.models.loading import load_tokenizer
from pdtrim_deploy.pipeline import build, on_policy
from pdtrim_deploy.pipeline.context import Context
from pdtrim_deploy.recipe import Recipe
from pdtrim_deploy.recipe.seed import MOST_SEED

PROMPT, LENGTH = 24, 36


@pytest.fixture
def context(tmp_path: Path, tiny_llama_dir: Path) -> Context:
    write_words(tmp_path / "text", words=60)
    calibration = {"mixture": [{"corpus": f"dir:{tmp_path / 'text'}", "share": 3}, {"corpus": "recall", "share": 1}]}
    calibration |= {"continuations": "sampled", "sequences": 12, "length": LENGTH, "prompt_tokens": PROMPT, "seed": 5}
    data = {"name": "own", "model": {"source": f"hf:{tiny_llama_dir}"}, "calibration": calibration}
    data["pruning"] = {"method": "greedy", "decode_blocks": 1}
    data["evaluation"] = {"corpus": f"dir:{tmp_path / 'text'}", "sequences": 2, "prompt_tokens": 24}
    data["evaluation"] |= {"continuation_tokens": 8}
    cache = Cache(tmp_path / "cache")
    checkpoint = resolve(data["model"]["source"], cache)
    return Context(Recipe.model_validate(data), checkpoint, cache, tmp_path / "b", lambda _: None)


def again(context: Context, **calibration: object) -> Context:
    recipe = context.recipe.changed("test", "calibration", **calibration)
    return Context(recipe, context.checkpoint, context.cache, context.out, context.note)


def test_the_largest_seed_draws_too(context: Context) -> None:
    drawn = [again(context, seed=MOST_SEED - n).calibration(12, LENGTH, PROMPT)[:, PROMPT:] for n in range(2)]
    assert not torch.equal(*drawn)


def test_prompts_are_the_corpora_s_and_what_follows_is_the_model_s(context: Context) -> None:
    ids = context.calibration(12, LENGTH, PROMPT)
    assert ids.shape == (12, LENGTH)
    tokenizer = load_tokenizer(context.checkpoint.path)
    parts = [
        (corpora.load(p.corpus, context.cache).split("calibration"), p.share) for p in context.recipe.calibration.shares
    ]
    assert torch.equal(ids[:, :PROMPT], corpora.mixed(parts, tokenizer, 12, PROMPT, 5, corpora.prompts))
    waiting = [tokenizer.decode(row[:PROMPT]).endswith("<|start|>assistant\n") for row in ids]
    assert sum(waiting) == 3, "a quarter are questions that wait for the model"
    assert not (ids[:, PROMPT:] == tokenizer.eos_token_id).any()
    greedy = again(context, continuations="greedy").calibration(12, LENGTH, PROMPT)
    free = context.model.generate(
        ids[:, :PROMPT], max_new_tokens=LENGTH - PROMPT, do_sample=False, suppress_tokens=[tokenizer.eos_token_id],
        eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    assert torch.equal(greedy, free)
    assert not torch.equal(greedy[:, PROMPT:], ids[:, PROMPT:])


def test_they_are_made_once_and_a_stopped_build_goes_on(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    really, sizes = on_policy.continued, list[int]()

    def counted(model: object, prompts: torch.Tensor, *more: object) -> torch.Tensor:
        sizes.append(len(prompts))
        if len(sizes) == 2:
            raise KeyboardInterrupt
        return really(model, prompts, *more)  # type: ignore[arg-type]

    monkeypatch.setattr(on_policy, "continued", counted)
    with pytest.raises(KeyboardInterrupt):
        context.calibration(12, LENGTH, PROMPT)
    ids = context.calibration(12, LENGTH, PROMPT)
    assert sizes == [8, 4, 4], "the first eight are not made again"
    assert torch.equal(ids, context.calibration(12, LENGTH, PROMPT))
    assert len(sizes) == 3
    alone = Context(context.recipe, context.checkpoint, Cache(context.out / "other"), context.out / "c", print)
    assert torch.equal(ids, alone.calibration(12, LENGTH, PROMPT)), "as in one go"
    again(context, seed=6).calibration(12, LENGTH, PROMPT)
    assert len(sizes) == 7


def test_a_build_reads_them(context: Context) -> None:
    notes: list[str] = []
    bundle = build(context.recipe, context.out, context.cache, notes.append)
    assert "the model continues prompts 1 to 8 of 12" in notes
    assert bundle.verify() == []
    assert bundle.recipe.digest == context.recipe.digest


def test_no_continuations_by_a_model_read_from_disk(context: Context) -> None:
    with pytest.raises(Exception, match=r"continuations is sampled but pruning\.blocks_in_memory is 2, .*allowed with"):
        context.recipe.changed("test", "pruning", blocks_in_memory=2)


def test_another_compute_dtype_speaks_for_itself(context: Context) -> None:
    half = Compute(dtype="float16")
    recipe = context.recipe.changed("test", "model", compute_dtype="float16")
    ids = [
        Context(r, context.checkpoint, context.cache, context.out, print, compute=c).calibration(12, LENGTH, PROMPT)
        for r, c in ((context.recipe, Compute()), (recipe, half))
    ]
    alone = Context(recipe, context.checkpoint, Cache(context.out / "o"), context.out / "c", print, compute=half)
    assert torch.equal(ids[1], alone.calibration(12, LENGTH, PROMPT)), "not what float32 left in the cache"


def test_a_prompt_of_one_token_is_refused(context: Context) -> None:
    with pytest.raises(UserError, match=r"calibration.*prompt_tokens is 1; allowed with continuations: at least 2"):
        again(context, prompt_tokens=1)
