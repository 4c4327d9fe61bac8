"""What a model could lose, as a table and as a picture."""

from __future__ import annotations

from rich.table import Table

from pdtrim_deploy.pruning.candidates import Candidates
from pdtrim_deploy.report.html.markup import Markup, tag

CELL, LEFT, TOP, HEIGHT = 26, 64, 30, 200
PRUNE, DISTIL = "#0072b2", "#d55e00"


def candidates_table(candidates: Candidates, model: str) -> Table:
    """Block by block; a rank counts the pruning set's blocks, the most redundant first."""
    rank = {block: str(n) for n, block in enumerate(candidates.pruning, 1)}
    table = Table("block", "cos(in, out)", "with the next", "set", "rank", title=f"what {model} could lose")
    for column in (*table.columns[:3], table.columns[4]):
        column.justify = "right"
    for block, cosine in enumerate(candidates.redundancy):
        pair = f"{candidates.pair_redundancy[block]:.4f}" if block < len(candidates.pair_redundancy) else ""
        table.add_row(str(block), f"{cosine:.4f}", pair, candidates.set_of(block), rank.get(block, ""))
    table.caption = (
        f"pruning set: {len(candidates.pruning)} blocks; distillation set: {len(candidates.distillation)} pairs above "
        f"{candidates.threshold:g}. A high cosine does not make a block harmless: the search measures the loss."
    )
    return table


def candidates_picture(candidates: Candidates, model: str) -> Markup:
    """A bar for each block, an arch for each pair of the distillation set; the threshold is a dashed line."""
    values = [*candidates.redundancy, *candidates.pair_redundancy, candidates.threshold]
    low = min(0.0, *values) if min(values) < 0.5 else min(values) - 0.02

    def y(cosine: float) -> float:
        return round(TOP + HEIGHT * (1 - (cosine - low) / (1 - low)), 1)

    blocks = len(candidates.redundancy)
    width, floor = LEFT + blocks * CELL + 12, y(low)
    parts = [tag("rect", width="100%", height="100%", fill="white")]
    for mark in (1.0, candidates.threshold, low):
        dashes = "4 3" if mark == candidates.threshold else None
        parts.append(
            tag("line", x1=LEFT, y1=y(mark), x2=width - 12, y2=y(mark), stroke="#999", stroke_dasharray=dashes)
        )
        parts.append(tag("text", f"{mark:.2f}", x=LEFT - 6, y=y(mark) + 4, text_anchor="end"))
    for block, cosine in enumerate(candidates.redundancy):
        x, kind = LEFT + block * CELL, candidates.set_of(block)
        title = tag("title", f"block {block}: cos {cosine:.4f}, {kind}")
        colour = PRUNE if kind == "prune" else DISTIL
        height = max(1.0, round(floor - y(cosine), 1))
        parts.append(tag("rect", title, x=x + 3, y=y(cosine), width=CELL - 6, height=height, fill=colour))
        parts.append(tag("text", block, x=x + CELL / 2, y=floor + 16, text_anchor="middle"))
    for first in candidates.distillation:
        middle, cosine = LEFT + first * CELL + CELL / 2, candidates.pair_redundancy[first]
        title = tag("title", f"blocks {first} and {first + 1}: cos {cosine:.4f}")
        arch = f"M{middle},{floor + 22} v6 h{CELL} v-6"
        parts.append(tag("path", title, d=arch, fill="none", stroke=DISTIL, stroke_width=2))
    for at, (colour, text) in enumerate(((PRUNE, "pruning set"), (DISTIL, "distillation set, by pairs"))):
        parts.append(tag("rect", x=LEFT + 190 * at, y=floor + 40, width=12, height=12, fill=colour))
        parts.append(tag("text", text, x=LEFT + 190 * at + 18, y=floor + 50))
    parts.append(tag("text", f"{model}: cosine between a block's input and output", x=LEFT, y=18))
    tall = floor + 62
    return tag(
        "svg", *parts, xmlns="http://www.w3.org/2000/svg", viewBox=f"0 0 {width} {tall}", width=width, height=tall,
        font_family="sans-serif", font_size=11, role="img", aria_label=f"pruning candidates of {model}",
    )  # fmt: skip
