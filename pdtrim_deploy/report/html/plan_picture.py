"""A picture of the plan: one column per block, one row per stage, and the KV bytes of each decode layer."""

from __future__ import annotations

from pdtrim_deploy.plan import STAGES, Action, PDPlan
from pdtrim_deploy.report.html.markup import Markup, tag

CELL, LEFT, BARS = 26, 74, 90
ROWS = {"prefill": 16, "decode": 52}
KV_TOP = 92


def plan_picture(plan: PDPlan, tokens: int) -> Markup:
    """Kept, dropped, distilled and KV-only blocks of both stages; KV as full or sparse, rows, wire dtype and bytes."""
    blocks = plan.model.num_blocks
    layer_of = {block: layer for layer, block in enumerate(plan.decode_kv_blocks)}
    most = (plan.dense_bytes(tokens, every_row=True) - plan.model.state_bytes) / len(plan.model.kv_blocks)
    parts: list[Markup] = []
    for stage in STAGES:
        top = ROWS[stage]
        parts.append(tag("text", stage, x=LEFT - 8, y=top + 18, text_anchor="end"))
        for block, action in enumerate(plan.actions(stage)):
            parts.append(_cell(block, top, action.kind, f"block {block}, {stage}: {_says(action, plan)}"))
    parts.append(tag("text", "KV sent", x=LEFT - 8, y=KV_TOP + BARS / 2, text_anchor="end"))
    for block, layer in layer_of.items():
        send, size = plan.kv[layer], plan.layer_bytes(layer, tokens)
        x, height = LEFT + block * CELL + 2, max(1.5, BARS * size / most)
        rows = "all" if send.mode == "full" else send.row_names
        less = f", {plan.key_offsets.form}" if plan.key_offsets and plan.has_key_offset(layer) else ""
        what = f"block {block}: {rows} of {tokens} rows, {send.wire_dtype}{less}, {size:,} bytes of {most:,.0f}"
        outline = tag("rect", x=x, y=KV_TOP, width=CELL - 4, height=BARS, class_="ghost")
        bar = tag(
            "rect", x=x, y=round(KV_TOP + BARS - height, 1), width=CELL - 4, height=round(height, 1), class_=send.mode
        )
        wire = tag(
            "text",
            "" if send.wire_dtype == "native" else send.wire_dtype,
            x=x + CELL / 2 - 2,
            y=KV_TOP + BARS + 26,
            class_="tiny",
        )
        parts.append(tag("g", tag("title", what), outline, bar, wire))
    parts += [
        tag("text", block, x=LEFT + block * CELL + CELL / 2, y=KV_TOP + BARS + 13, class_="tiny")
        for block in range(blocks)
    ]
    width, height_ = LEFT + blocks * CELL + 6, KV_TOP + BARS + 34
    picture = tag(
        "svg", *parts, xmlns="http://www.w3.org/2000/svg", viewBox=f"0 0 {width} {height_}", width=width,
        height=height_, role="img", aria_label=f"plan {plan.digest[:12]} block by block",
    )  # fmt: skip
    kinds = {action.kind for stage in STAGES for action in plan.actions(stage)} | {send.mode for send in plan.kv}
    names = LEGEND | ({"kv_only": f"{LEGEND['kv_only']}{_but(plan)}"} if plan.kv_only_tail else {})
    shown = [(kind, text) for kind, text in names.items() if kind in kinds]
    legend = tag("p", *(tag("span", tag("i", " ", class_=kind), text) for kind, text in shown), class_="legend")
    return tag("figure", tag("div", picture, class_="wide"), legend)


LEGEND = {
    "keep": "kept",
    "drop": "dropped",
    "distilled": "distilled from a pair",
    "kv_only": "run for its K and V alone",
    "without_attention": "its MLP alone: no KV",
    "without_mlp": "its attention alone",
    "full": "all prompt rows",
    "window": "all prompt rows that its window reads",
    "sparse": "first and last rows only (the outline is dense); a wire dtype stands under its bar unless it is native",
}


def _cell(block: int, top: float, kind: str, says: str) -> Markup:
    shape = tag("rect", x=LEFT + block * CELL + 2, y=top, width=CELL - 4, height=26, rx=3, class_=kind)
    return tag("g", tag("title", says), shape)


def _says(action: Action, plan: PDPlan) -> str:
    if action.kind == "kv_only" and plan.kv_only_tail:
        return f"kv_only{_but(plan)}"
    return f"distilled from blocks {action.pair}" if action.kind == "distilled" else action.kind


def _but(plan: PDPlan) -> str:
    return f", but for the last {plan.kv_only_tail} tokens of a prompt"
