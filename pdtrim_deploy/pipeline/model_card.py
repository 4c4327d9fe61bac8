"""The README.md of each checkpoint: what it was made from, what it lacks, what that cost, how to serve it.

Cards are not sealed: `pdtrim-deploy eval` writes the measured loss into them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from pdtrim_deploy import __version__
from pdtrim_deploy.bundle import CARD, REPORTS
from pdtrim_deploy.bundle.recoveries import HEAD, keep_recoveries, recoveries
from pdtrim_deploy.local.atomic import write_atomic
from pdtrim_deploy.models.provenance import Provenance
from pdtrim_deploy.pipeline import model_card_parts as parts
from pdtrim_deploy.plan import CHECKPOINTS, PDPlan, Stage
from pdtrim_deploy.recipe import Recipe

if TYPE_CHECKING:
    from pdtrim_deploy.evaluation.quality import Quality

BEGIN, END = "<!-- loss:begin -->", "<!-- loss:end -->"
TABLE = ("<!-- recovery:begin -->", "<!-- recovery:end -->")
NOT_MEASURED = "Not measured yet: run `pdtrim-deploy eval` on the bundle."
SECRET = (
    "SECRET is a file that all workers of the pair are given; `openssl rand -hex 32` makes one. On a cluster: "
    "`pdtrim-deploy deploy render BUNDLE`."
)
AGAIN = """pdtrim-deploy build BUNDLE/recipe.yaml --out AGAIN
pdtrim-deploy eval BUNDLE
pdtrim-deploy verify BUNDLE"""


def write_cards(
    out: Path,
    plan: PDPlan,
    recipe: Recipe,
    base: Provenance,
    healed: parts.Healed,
    short: str | None = None,
    left_out: Collection[Stage] = (),
) -> None:
    """A card for each checkpoint of the bundle at `out`.

    `healed` is what `pipeline.heal_kv.healed` says, `short` what `pipeline.fit_tokens` does of text that is too short,
    `left_out` what `pipeline.heal.left_out` does of compensation that did not help.
    """
    for folder, stage in plan.checkpoints.items():
        write_atomic(out / folder / CARD, card(plan, recipe, stage, base, healed, short, left_out))


def refresh_cards(bundle: Path, quality: Quality) -> None:
    """Put the measured loss into all cards, where there are cards."""
    _refresh(bundle, (BEGIN, END), measured(quality))


def refresh_recoveries(bundle: Path, plan_digest: str, gates: Mapping[str, float]) -> None:
    """Put what `reports/` say of this plan's recovery, and which gates nobody measured, into cards that are there."""
    keep_recoveries(bundle / REPORTS, plan_digest)
    rows = recoveries(bundle / REPORTS, plan_digest, gates)
    lines = ["| " + " | ".join(row) + " |" for row in (HEAD, ("---",) * len(HEAD), *rows)] if rows else []
    _refresh(bundle, TABLE, "\n".join(lines))


def _refresh(bundle: Path, marks: tuple[str, str], text: str) -> None:
    """Put `text` between the marks of all cards."""
    for folder in CHECKPOINTS:
        path = bundle / folder / CARD
        if path.is_file():
            before, begin, rest = path.read_text().partition(marks[0])
            _, end, after = rest.partition(marks[1])
            if begin and end:
                write_atomic(path, f"{before}{begin}\n{text}\n{end}{after}")


def card(
    plan: PDPlan,
    recipe: Recipe,
    stage: Stage,
    base: Provenance,
    healed: parts.Healed,
    short: str | None = None,
    left_out: Collection[Stage] = (),
) -> str:
    """The card's text."""
    front: dict[str, Any] = {"base_model": base.hub_name} if base.hub_name else {}
    front |= base.licence | {"pipeline_tag": "text-generation", "library_name": "sglang"}
    front |= {"tags": ["pdtrim", *([] if plan.unified else ["prefill-decode-disaggregation", stage])]}
    what = [
        f"- Base model: `{recipe.model.source}` ({plan.model.architecture}, fingerprint `{plan.model.fingerprint}`)",
        f"- Dtype: {recipe.model.dtype}",
        f"- Blocks: {parts.blocks(plan, stage)}",
        *parts.experts(plan, recipe, stage),
        *parts.changed(plan, recipe, stage, healed, compensated=stage not in left_out),
        *([f"- Short text: {short}"] if short else []),
        *([] if plan.unified else [f"- Prompt KV from prefill to decode: {parts.kv(plan, recipe)}"]),
    ]
    sections = [
        f"# {recipe.name}: {'one model for both stages' if plan.unified else f'{stage} stage'}",
        parts.standing(plan, stage, __version__),
        "## What it is",
        "\n".join(what),
        "## What that costs",
        f"{BEGIN}\n{NOT_MEASURED}\n{END}",
        "\n\n".join(TABLE),
        "## How it was made",
        "\n".join(parts.provenance(recipe, plan)),
        f"```\n{AGAIN}\n```",
        "## Serve",
        "```\npdtrim-deploy serve BUNDLE\n```",
        "or, in your own SGLang on GPUs with pdtrim-deploy installed"
        + (":" if plan.unified else ", behind sglang-router:"),
        f"```\n{parts.launch(plan, recipe, stage)}\n```",
        *([] if plan.unified else [SECRET]),
        "## Licence",
        parts.licence(base),
    ]
    return f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n\n" + "\n\n".join(sections) + "\n"


def measured(quality: Quality) -> str:
    """The loss in one sentence, with what it was measured on and the command that does it again."""
    text, computed = quality.text, quality.computed_in or quality.dtype
    dtype = quality.dtype if computed == quality.dtype else f"{quality.dtype}, computed in {computed}"
    return (
        f"Perplexity {quality.pd.ppl:.4f} behind the plan, {quality.dense.ppl:.4f} of the base model: ratio "
        f"{quality.ratio:.4f}. Over {quality.tokens:,} tokens that continue {text.prompt_tokens}-token prompts of "
        f"`{text.corpus}` (seed {text.seed}, {dtype}); made by `{quality.environment['command']}`."
    )
