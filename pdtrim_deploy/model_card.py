"""The README.md of each stage checkpoint: what it was made from, what it lacks, what that cost, how to serve it.

Cards are not sealed: `pdtrim-deploy eval` writes the measured loss into them.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from pdtrim_deploy import __version__
from pdtrim_deploy.bundle import CARD, write_atomic
from pdtrim_deploy.plan import STAGES, PDPlan, Stage
from pdtrim_deploy.recipe import Recipe

if TYPE_CHECKING:
    from pdtrim_deploy.evaluation.quality import Quality

BEGIN, END = "<!-- loss:begin -->", "<!-- loss:end -->"
NOT_MEASURED = "Not measured yet: run `pdtrim-deploy eval` on the bundle."
LICENCE_KEYS = ("license", "license_name", "license_link")


def write_cards(out: Path, plan: PDPlan, recipe: Recipe, source: Path) -> None:
    """A card for each stage checkpoint of the bundle at `out`; `source` is the folder of the base model."""
    for stage in STAGES:
        write_atomic(out / stage / CARD, card(plan, recipe, stage, licence(source)))


def refresh_cards(bundle: Path, quality: Quality) -> None:
    """Put the measured loss into both cards, where there are cards."""
    for stage in STAGES:
        path = bundle / stage / CARD
        if path.is_file():
            before, begin, rest = path.read_text().partition(BEGIN)
            _, end, after = rest.partition(END)
            if begin and end:
                write_atomic(path, f"{before}{BEGIN}\n{measured(quality)}\n{END}{after}")


def licence(source: Path) -> dict[str, Any]:
    """The licence keys of the base model's own card, and its licence files under `files`."""
    files = sorted(f.name for pattern in ("LICENSE*", "NOTICE*") for f in source.glob(pattern))
    found: dict[str, Any] = {"files": files} if files else {}
    readme = source / CARD
    front = re.match(r"---\n(.*?)\n---\n", readme.read_text(errors="replace"), re.DOTALL) if readme.is_file() else None
    try:
        said = yaml.safe_load(front[1]) if front else None
    except yaml.YAMLError:
        said = None
    return found | ({key: said[key] for key in LICENCE_KEYS if key in said} if isinstance(said, dict) else {})


def card(plan: PDPlan, recipe: Recipe, stage: Stage, licensed: dict[str, Any]) -> str:
    """The card's text."""
    tokens, total = recipe.evaluation.prompt_tokens, plan.model.num_blocks
    front = {key: licensed[key] for key in LICENCE_KEYS if key in licensed}
    front |= {"library_name": "sglang", "tags": ["pdtrim", "prefill-decode-disaggregation", stage]}
    dropped = plan.dropped(stage)
    size, smaller = plan.payload_bytes(tokens), plan.reduction(tokens)
    sparse = [b for b, send in zip(plan.decode_layers, plan.kv, strict=True) if send.mode == "sparse"]
    lines = [
        f"# {recipe.name}: {stage} stage",
        f"One half of a pair, made by pdtrim-deploy {__version__}. It answers nobody on its own: the other half stands "
        f"beside it in the bundle, and both carry plan `{plan.digest}`.",
        "## What it is",
        f"- Base model: `{recipe.model.source}` ({plan.model.architecture}, fingerprint `{plan.model.fingerprint}`)",
        f"- Dtype: {recipe.model.dtype}",
        f"- Blocks: {len(plan.layers(stage))} of {total}; without block{'' if len(dropped) == 1 else 's'} "
        f"{', '.join(map(str, dropped)) or '- none'}{_students(plan, stage)}",
        *_changed(recipe, stage),
        f"- Prompt KV from prefill to decode: {len(sparse)} of {len(plan.kv)} decode layers get the first and last "
        f"prompt tokens alone{f' (blocks {_list(sparse)})' if sparse else ''}; "
        f"{size:,} bytes for {tokens} prompt tokens, {smaller:.2f}x less than dense",
        "## What that costs",
        f"{BEGIN}\n{NOT_MEASURED}\n{END}",
        "## Serve",
        "```\npdtrim-deploy serve BUNDLE\n```",
        "or, in your own SGLang with pdtrim-deploy installed:",
        "```\npython -m sglang.launch_server --model-path BUNDLE/" + stage + f" --disaggregation-mode {stage} "
        f"--disaggregation-transfer-backend pdtrim_tcp --dtype {recipe.model.dtype}\n```",
        "## Licence",
        _licence_sentence(licensed),
    ]
    text = "\n\n".join(lines).replace("\n\n- ", "\n- ").replace(" is\n- ", " is\n\n- ")
    return f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n\n{text}\n"


def measured(quality: Quality) -> str:
    """The loss in one sentence, with what it was measured on and the command that does it again."""
    text = quality.text
    return (
        f"Perplexity {quality.pd.ppl:.4f} behind the plan, {quality.dense.ppl:.4f} of the base model: ratio "
        f"{quality.ratio:.4f}. Over {quality.tokens:,} tokens that continue {text.prompt_tokens}-token prompts of "
        f"`{text.corpus}` (seed {text.seed}, {quality.dtype}); made by `{quality.environment['command']}`."
    )


def _students(plan: PDPlan, stage: Stage) -> str:
    pairs = sorted({action.pair for action in plan.actions(stage) if action.kind == "distilled"})
    said = ", ".join(f"{first} and {second}" for first, second in pairs)
    alone = [str(block) for block, action in enumerate(plan.actions(stage)) if action.kind == "kv_only"]
    kv_only = f"; for their K and V alone: {', '.join(alone)}" if alone else ""
    return (f"; one student block in the place of each of the pairs {said}" if pairs else "") + kv_only


def _changed(recipe: Recipe, stage: Stage) -> list[str]:
    """What was done to the weights, when something was."""
    asked, pruned = recipe.healing, getattr(recipe.pruning, f"{stage}_blocks")
    steps = asked.prefill_steps if stage == "prefill" else asked.decode_steps
    done = [f"compensation {asked.compensation}"] if asked.compensation != "none" else []
    done += [f"at most {steps} steps of logit distillation from the base model"] if steps else []
    return [f"- Weights differ from the base model's: {', '.join(done)}; K and V are made as there"] * bool(
        done and pruned
    )


def _licence_sentence(licensed: dict[str, Any]) -> str:
    named = licensed.get("license_name") or licensed.get("license")
    files = licensed.get("files")
    if not named and not files:
        return "The base model's folder states no licence: find out under which it is given before you share this."
    said = f"That of the base model: {named}." if named else "That of the base model."
    return said + (f" Carried over in {', '.join(f'`{name}`' for name in files)}." if files else "")


def _list(blocks: list[int]) -> str:
    return ", ".join(map(str, blocks))
