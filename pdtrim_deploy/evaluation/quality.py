"""What a bundle costs in quality: dense and PD perplexity of the same held-out continuations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict

from pdtrim_deploy.bundle import Bundle
from pdtrim_deploy.errors import UserError
from pdtrim_deploy.evaluation import corpora
from pdtrim_deploy.evaluation.bundle_oracle import oracle_of
from pdtrim_deploy.evaluation.limits import STREAMED_KV, fit_judging
from pdtrim_deploy.evaluation.measured import Measured
from pdtrim_deploy.evaluation.perplexity import BATCH, Perplexity, pd_perplexity
from pdtrim_deploy.evaluation.recovery import Recovery
from pdtrim_deploy.local.cache import Cache
from pdtrim_deploy.local.compute import ON_CPU, Compute
from pdtrim_deploy.models.oracle import PDOracle
from pdtrim_deploy.plan import PDPlan
from pdtrim_deploy.recipe import EvaluationSection

if TYPE_CHECKING:
    from pdtrim_deploy.models import Checkpoint


class Score(BaseModel):
    """Over `tokens` tokens; `nll` in nats a token, `nll_per_sequence` in the order of the sequences."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    ppl: float
    nll: float
    nll_per_sequence: list[float]

    @classmethod
    def of(cls, result: Perplexity) -> Score:
        """From the oracle's result."""
        return cls(ppl=result.ppl, nll=result.nll_mean, nll_per_sequence=list(result.per_sequence))


class Quality(BaseModel):
    """`ratio` is PD over dense perplexity, `recovery` the same with its error and the recipe's gate.

    The text is that of the corpus's final split, `corpus_sha256` names it. Sequences of equal `documents` are of one
    document, and count as one in the error (empty: not recorded).

    Weights and KV pool have `dtype`; `computed_in` may be wider, where the CPU has no instructions for it (None: not
    recorded). `device` names what it was computed on.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    plan_digest: str
    text: EvaluationSection
    corpus_sha256: str
    tokens: int
    dtype: str
    computed_in: str | None = None
    device: str | None = None
    dense: Score
    pd: Score
    documents: tuple[int, ...] = ()
    ratio: float
    recovery: Recovery | None = None
    environment: dict[str, Any]


def source_of(bundle: Bundle, cache: Cache, note: Callable[[str], None] = lambda _: None) -> Checkpoint:
    """The model that `bundle` was made of; UserError when it cannot be had or is another now."""
    from pdtrim_deploy.models import resolve

    source = resolve(bundle.recipe.model.source, cache, note)
    if source.fingerprint != bundle.plan.model.fingerprint:
        raise UserError(f"{bundle.recipe.model.source} is not the model that {bundle.path} was made of; build it again")
    return source


def judge_bundle(
    bundle: Bundle,
    cache: Cache,
    environment: dict[str, Any],
    section: EvaluationSection | None = None,
    note: Callable[[str], None] = lambda _: None,
    compute: Compute | None = None,
) -> Quality:
    """Score the stage models as written, behind the plan, and the source model behind a dense plan.

    Args:
        section: the text; the recipe's when left out.
        compute: where and in what; this CPU, in what it is fast at, when left out.

    Raises:
        UserError: the source cannot be had or is not the model that was pruned, the corpus gives too little text,
            or a loss is not a number.

    """
    from pdtrim_deploy.models.loading import load_tokenizer
    from pdtrim_deploy.models.on_devices import load_to_compute

    section, dtype, plan = section or bundle.recipe.evaluation, bundle.recipe.model.dtype, bundle.plan
    compute = ON_CPU.fast(dtype) if compute is None else compute
    source = source_of(bundle, cache, note)
    compute = fit_judging(
        (bundle.weight_folders, [source.path]), BATCH * (section.prompt_tokens + section.continuation_tokens), compute
    )
    corpus = corpora.load(section.corpus, cache, note)
    texts = corpora.windows(
        corpus.split("final"),
        load_tokenizer(source.path),
        section.sequences,
        section.prompt_tokens + section.continuation_tokens,
        section.seed,
    )

    def score(name: str, oracle: PDOracle) -> Perplexity:
        kv_bytes = compute.states(STREAMED_KV) if compute.streams(plan.model.num_blocks) else 0
        return pd_perplexity(
            oracle, texts.ids, section.prompt_tokens, progress=lambda line: note(f"{name} {line}"), kv_bytes=kv_bytes
        )

    pd = score("PD", oracle_of(bundle, note, compute))
    whole = load_to_compute("dense", source.path, dtype, note, compute)
    dense = score("dense", PDOracle(whole, whole, PDPlan.dense(plan.model)))
    losses = [measured(result.per_sequence, texts.documents) for result in (dense, pd)]
    return Quality(
        plan_digest=plan.digest,
        text=section,
        corpus_sha256=corpus.digest,
        tokens=pd.tokens,
        dtype=dtype,
        computed_in=compute.dtype,
        device=compute.names,
        dense=Score.of(dense),
        pd=Score.of(pd),
        documents=texts.documents,
        ratio=pd.ppl / dense.ppl,
        recovery=Recovery.of(losses[0], losses[1], bundle.recipe.quality),
        environment=environment,
    )


def measured(losses: Sequence[float], documents: tuple[int, ...]) -> Measured:
    """Losses of sequences, and the document of each (none: each is its own)."""
    return Measured("perplexity", ("all",) * len(losses), {"nll": tuple(losses)}, documents)
