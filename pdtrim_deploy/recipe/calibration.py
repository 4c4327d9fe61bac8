"""The recipe's section on the text that decides what is removed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, PositiveInt, SerializerFunctionWrapHandler, model_serializer, model_validator

from pdtrim_deploy.recipe.section import Section
from pdtrim_deploy.recipe.seed import Seed

Corpus = Annotated[
    str,
    Field(
        pattern=r"^(brown|austen|code|questions|agents|recall|(dir|file|jsonl|parquet|hub):.+)$",
        description="brown, austen, code, questions, agents, recall, dir:PATH, file:PATH, jsonl:PATH, parquet:PATH or "
        "hub:OWNER/NAME/FILE",
    ),
]

_LATER: dict[str, tuple[Any, ...]] = {
    "prompt_tokens": (None,),
    "mixture": ((), []),
    "lengths": (None,),
    "continuations": ("text",),
}


class CorpusShare(Section):
    """A corpus of a mixture; shares are weights, of any sum."""

    corpus: Corpus
    share: Annotated[float, Field(gt=0)]


DEFAULT_MIXTURE = tuple(
    CorpusShare(corpus=corpus, share=share)
    for corpus, share in (("brown", 0.4), ("code", 0.3), ("questions", 0.2), ("recall", 0.1))
)
"""Prose, code, questions with answers, and facts to be found in a prompt: what is read where nothing is named."""


class CalibrationSection(Section):
    """Text that decides what is removed: `sequences` x `length` tokens of the calibration split.

    Where neither `corpus` nor `mixture` is given, it is `DEFAULT_MIXTURE`.

    Attributes:
        corpus: one for all; of no meaning where there is a `mixture`.
        mixture: several corpora and their shares, in place of `corpus`.
        continuations: `text` reads on where a prompt ends; `greedy` and `sampled` put the dense model's own words
            behind prompts (a conversation is cut off before its last answer), the likeliest or drawn by `seed`.
        lengths: a trace of a load test; text that is no conversation is cut to the prompt lengths of its requests, and
            a sequence holds as many requests as it has room for.
        prompt_tokens: length of the prompts that decode's blocks are searched behind; half of `length` when left out.

    """

    AT_ONCE: ClassVar[int] = 8  # prompts that the model goes on from side by side

    corpus: Corpus = "brown"
    sequences: PositiveInt = 16
    mixture: Annotated[tuple[CorpusShare, ...], Field(strict=False)] = ()
    continuations: Literal["text", "greedy", "sampled"] = "text"
    lengths: str | None = None
    length: Annotated[int, Field(ge=16)] = 256
    prompt_tokens: PositiveInt | None = None
    seed: Seed = 0

    @property
    def shares(self) -> tuple[CorpusShare, ...]:
        """All corpora; a single one as the whole."""
        return self.mixture or (CorpusShare(corpus=self.corpus, share=1.0),)

    @property
    def has_questions(self) -> bool:
        """Whether some of MMLU's test questions are among the text."""
        return any(part.corpus == "questions" for part in self.shares)

    @property
    def prompt(self) -> int:
        """Tokens of the prompts."""
        return self.length // 2 if self.prompt_tokens is None else self.prompt_tokens

    @model_validator(mode="before")
    @classmethod
    def _mixed_by_default(cls, data: Any) -> Any:
        if isinstance(data, Mapping) and "corpus" not in data and data.get("mixture", ()) in ((), []):
            return {**data, "mixture": DEFAULT_MIXTURE}
        return data

    @model_validator(mode="after")
    def _text_of_one_kind(self) -> CalibrationSection:
        if self.mixture and self.corpus != "brown":  # a dump has the default's name beside a mixture
            raise ValueError(f"corpus is '{self.corpus}' but mixture is given; allowed with it: mixture []")
        return self

    @model_validator(mode="after")
    def _each_corpus_once(self) -> CalibrationSection:
        names = [part.corpus for part in self.mixture]
        twice = [name for name in names if names.count(name) > 1]
        if twice:  # each of its sequences would be read twice
            raise ValueError(f"mixture names {twice[0]} twice; allowed: each corpus once, with the sum of its shares")
        return self

    @model_validator(mode="after")
    def _something_scored(self) -> CalibrationSection:
        if self.prompt > self.length - 2:
            raise ValueError(
                f"prompt_tokens is {self.prompt_tokens} but length is {self.length}; allowed: at most "
                f"{self.length - 2}, since decode is scored on the tokens after the prompt's next one"
            )
        if self.continuations != "text" and self.prompt < 2:
            raise ValueError("prompt_tokens is 1; allowed with continuations: at least 2, which the model goes on from")
        return self

    @model_serializer(mode="wrap")
    def _without_defaults(self, serialise: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Dump only what is not the default of keys that came later: older recipes keep their digest."""
        return {name: value for name, value in serialise(self).items() if value not in _LATER.get(name, ())}
