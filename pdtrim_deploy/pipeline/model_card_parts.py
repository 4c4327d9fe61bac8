"""The sentences of a model card, from the plan, the recipe and what healing reported."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pdtrim_deploy.models.provenance import Provenance
from pdtrim_deploy.plan import PDPlan, Stage
from pdtrim_deploy.plan.blocks import BODY
from pdtrim_deploy.recipe import CalibrationSection, Recipe
from pdtrim_deploy.recipe.kv import FIXED_KV
from pdtrim_deploy.serving.gpu_defaults import (
    PAGE_TOKENS,
    attention_arguments,
    graph_arguments,
    pool_arguments,
    precision_environment,
)

Healed = Mapping[Stage, Sequence[Mapping[str, Any]]]


def standing(plan: PDPlan, stage: Stage, version: str) -> str:
    """Whether the checkpoint answers on its own, and why not."""
    if plan.unified:
        return (
            f"A whole model that prefills and decodes, made by pdtrim-deploy {version} with plan `{plan.digest}`. It "
            "answers on its own, in any engine that runs its architecture."
        )
    text = (
        f"One half of a pair, made by pdtrim-deploy {version}. It answers nobody on its own: the other half stands "
        f"beside it in the bundle, and both carry plan `{plan.digest}`."
    )
    if stage == "prefill" and plan.kv_only_tail:
        return (
            f"{text} It has the base model's weights, for the last {plan.kv_only_tail} tokens of each prompt. The "
            f"tokens before them run through `{BODY}/`, which only SGLang with pdtrim-deploy reads."
        )
    if stage == "prefill" or all(action.kind == "keep" for action in plan.decode):
        return text
    return (
        f"{text} Its blocks were chosen, and any weights fitted, for the tokens behind a prompt that the other half "
        "has read. Loaded as a whole model it reads prompts by itself, for which it was not made: what it loses then "
        "can be many times what the pair loses, and says nothing about the pair."
    )


def blocks(plan: PDPlan, stage: Stage) -> str:
    """Which blocks of the base model the stage runs."""
    actions, dropped = plan.actions(stage), plan.dropped(stage)
    text = f"{len(plan.layers(stage))} of {plan.model.num_blocks}"
    text += f"; without block{'s' * (len(dropped) > 1)} {_list(dropped)}" if dropped else ""
    pairs = sorted({action.pair for action in actions if action.kind == "distilled"})
    if pairs:
        text += f"; one student block in the place of each of the pairs {_list(f'{a} and {b}' for a, b in pairs)}"
    alone = [block for block, action in enumerate(actions) if action.kind == "kv_only"]
    whole = f", but for the last {plan.kv_only_tail} tokens of a prompt" if plan.kv_only_tail else ""
    text += f"; for their K and V alone{whole}: {_list(alone)}" if alone else ""
    missing = plan.missing(stage)
    for sublayer, name, tensor in (("attention", "attention", "o_proj"), ("mlp", "MLP", "down_proj")):
        if lost := [block for block, lacks in missing.items() if lacks == sublayer]:
            text += f"; without {name}, whose {tensor} is zero: {_list(lost)}"
    return text


def experts(plan: PDPlan, recipe: Recipe, stage: Stage) -> list[str]:
    """How many experts the stage's blocks keep, where that is not all."""
    section = recipe.pruning.experts
    if plan.experts is None or section is None or not plan.kept_experts(stage):
        return []
    shared = ", one set for both stages" if section.shared else ""
    return [
        f"- Experts of each block: {plan.experts.count(stage)} of {plan.experts.shape.count}, chosen by "
        f"`{section.method}`{shared}, numbered from 0 again; a token still goes to {plan.experts.shape.top_k}"
    ]


def kv(plan: PDPlan, recipe: Recipe) -> str:
    """What is sent of the prompt's KV, and in how many bytes."""
    tokens = recipe.evaluation.prompt_tokens
    sparse = [block for block, send in zip(plan.decode_kv_blocks, plan.kv, strict=True) if send.mode == "sparse"]
    cut = f"{len(sparse)} of {len(plan.kv)} decode layers get the first and last prompt tokens alone"
    if windows := sum(send.mode == "window" for send in plan.kv):
        cut = f"{windows} get the rows that their sliding windows read, {cut}"
    if (states := plan.model.states) is not None:
        cut = f"{len(states.blocks)} blocks keep a state in the place of KV, sent as it is, {cut}"
    wires = Counter(plan.model.row_dtype if send.wire_dtype == "native" else send.wire_dtype for send in plan.kv)
    return (
        f"{cut}{f' (blocks {_list(sparse)})' if sparse else ''}; sent as "
        f"{_list(f'{wire} ({count} layers)' for wire, count in wires.most_common())}; "
        f"{plan.payload_bytes(tokens):,} bytes for {tokens} prompt tokens, "
        f"{plan.reductions(tokens)}"
    )


def changed(plan: PDPlan, recipe: Recipe, stage: Stage, healed: Healed, *, compensated: bool = True) -> list[str]:
    """What was done to the weights, when something was; `compensated`: unless compensation did not help."""
    actions = plan.actions(stage)
    done = ["students of distilled pairs"] * any(action.kind == "distilled" for action in actions)
    if compensated and recipe.healing.compensation != "none" and any(action.kind != "keep" for action in actions):
        done.append(f"compensation {recipe.healing.compensation}")
    alone = any(action.kind == "kv_only" for action in actions)
    for report in (report for report in healed.get(stage, ()) if report["kept"]):
        steps = f"{report['steps']} steps of distillation from the base model"
        steps += " by what the pair predicts" * alone
        steps += " behind prompt KV as it arrives" * report["kv"]
        done.append(
            f"{steps} (KL {report['before']:.4f} to {report['after']:.4f} nats a token on held-out calibration text, "
            f"difference {report['difference']:+.4f} ± {report['stderr']:.4f}, paired by "
            f"{report['sequences']} sequences)"
        )
    done += ["K and V of the blocks that run for these alone, refitted"] * alone
    if not done:
        return []
    same = "of all other blocks are" if alone else "are"
    differ = f"Weights in `{BODY}/` differ" if alone and plan.kv_only_tail else "Weights differ"
    return [f"- {differ} from the base model's: {', '.join(done)}; what makes K and V {same} as there"]


def _taught(recipe: Recipe) -> str:
    """Text of students (`pipeline.texts.taught`)."""
    text, healing = recipe.calibration, recipe.healing
    if not healing.enabled:
        return f"{text.sequences} x {text.length}"
    return f"{healing.taught(recipe.pruning.finalists)} x {healing.length}"


_KL = ", by KL to the dense model"


def _corpus(text: CalibrationSection) -> str:
    """What calibration text is of, with its seed."""
    total = sum(part.share for part in text.shares)
    parts = [f"{part.share / total:.0%} `{part.corpus}`" for part in text.mixture] or [f"`{text.corpus}`"]
    continued = "" if text.continuations == "text" else f", continued by the dense model ({text.continuations})"
    return f"{', '.join(parts)}{continued}, seed {text.seed}"


def provenance(recipe: Recipe, plan: PDPlan) -> list[str]:
    """Text and seeds of each choice; all text is that of the calibration split of its corpus."""
    text, pruning, healing, kv = recipe.calibration, recipe.pruning, recipe.healing, recipe.kv
    lines = [f"- Recipe `{recipe.name}` (`recipe.yaml` in the bundle), digest `{recipe.digest}`"]
    corpus = _corpus(text)
    if recipe.target is not None:
        lines.append(
            f"- Actions of both stages and KV chosen together for {recipe.target}, by KL to the dense model on "
            f"{kv.sequences} x {kv.prompt_tokens + kv.continuation_tokens} tokens of {corpus}; times are "
            f"{'computed' if recipe.target.times is None else 'measured'}; `reports/target.json` in the bundle says "
            "what was reached"
        )
    if pruning.decode_loses:
        chosen = "Blocks and sublayers" if pruning.decode_sublayers else "Blocks"
        lines.append(
            f"- {chosen} chosen by `{pruning.method}` (seed {pruning.seed}{_KL * (pruning.objective == 'kl')}) on "
            f"{text.sequences} x {text.length} tokens of {corpus}"
        )
    if pruning.experts is not None and pruning.experts.method != "random":
        lines.append(f"- Experts ranked on {text.sequences} x {text.length} tokens of {corpus}")
    if pruning.distil:
        lines.append(
            f"- Students trained on {_taught(recipe)} tokens of {corpus}: least squares, then "
            f"{recipe.students.steps} steps each (seed {recipe.students.seed})"
        )
    if healing.enabled:
        lines.append(
            f"- Weights mended on {healing.sequences} x {healing.length} tokens of {corpus} (seed {healing.seed})"
            + (f"; fits without gradients on the first {healing.fitted}" if healing.fit_sequences is not None else "")
        )
    if healing.kv_steps:
        length = kv.prompt_tokens + healing.length // 2
        lines.append(f"- Decode healed behind its KV on {healing.sequences} x {length} tokens of {corpus}")
    if kv.measures_offsets and plan.model.offsets_keys:
        tokens = f"{kv.sequences} x {kv.prompt_tokens} tokens of {corpus}"
        lines.append(f"- Means of keys before RoPE, and key scales, measured on {tokens}")
    if recipe.target is not None or plan.unified:
        return lines
    if kv.method in FIXED_KV:
        return [*lines, f"- KV chosen by rule `{kv.method}`, on no text"]
    sizes = " and ".join(f"{kv.sequences} x {prompt + kv.continuation_tokens}" for prompt in kv.prompts)
    return [*lines, f"- KV chosen by `{kv.method}` on {sizes} tokens of {corpus}"]


def launch(plan: PDPlan, recipe: Recipe, stage: Stage) -> str:
    """The stage's worker in the user's own SGLang 0.5.23, on a GPU."""
    environment = {"SGLANG_PLUGINS": "pdtrim"} | precision_environment(recipe.model.dtype, plan.model.conv_dtype)
    variables = " ".join(f"{name}={value}" for name, value in environment.items())
    attention = attention_arguments(stage, any(s.mode == "sparse" for s in plan.kv), recipe.model.dtype)
    if plan.unified:
        options = "".join(f" {option} {value}" for option, value in attention.items())
        return (
            f"{variables} python -m sglang.launch_server --model-path BUNDLE/{plan.folder(stage)} "
            f"--dtype {recipe.model.dtype}{options}"
        )
    lines = [
        f"{variables} python -m sglang.launch_server --model-path BUNDLE/{stage}",
        f"--dtype {recipe.model.dtype} --disaggregation-mode {stage} --disaggregation-transfer-backend pdtrim_tcp",
        """--json-model-override-args '{"pdtrim_secret_file": "SECRET"}'""",
    ]
    arguments = {"--page-size": PAGE_TOKENS} | attention
    arguments |= pool_arguments(plan.model.pool_dtype) | graph_arguments(stage, plan.kv_only_tail > 0)
    lines.append(" ".join(f"{option} {value}" for option, value in arguments.items()))
    return " \\\n    ".join(lines)


def licence(base: Provenance) -> str:
    """The sentence under Licence."""
    if not base.name and not base.files:
        return "The base model's folder states no licence: find out under which it is given before you share this."
    sentence = f"That of the base model: {base.name}." if base.name else "That of the base model."
    return sentence + (f" Carried over in {_list(f'`{name}`' for name in base.files)}." if base.files else "")


def _list(items: Iterable[object]) -> str:
    return ", ".join(map(str, items))
