"""The codes of a latent and of its rope key (MLA) beside each other."""

from __future__ import annotations

from statistics import fmean
from typing import Any

from tables.base import table, where

DENSE = 2 * (512 + 64)  # bytes of a token in a layer in bfloat16


def latents(data: dict[str, Any]) -> str:
    """Bytes and divergence of each pair of codes."""
    rows = [
        (
            row["latent"], row["rope"], row["bytes"], f"{DENSE / row['bytes']:.2f}x",
            f"{fmean(row['kl']):.2e} ({min(row['kl']):.1e}-{max(row['kl']):.1e})",
        )
        for row in data["rows"]
    ]  # fmt: skip
    options = data["options"]
    text = (
        f"{options['seeds']} random models with DeepSeek-V2's attention and 6 blocks without experts, in float32: "
        f"decode's next-token distributions at {options['sequences']} x {options['continuation']} tokens after "
        f"{options['prompt']}-token prompts, mean (least-most) of the models"
    )
    head = ("latent", "rope key", "bytes a token and layer", "less than bfloat16", "KL, nats")
    return table(head, rows) + where(data["environment"], text, model="")
