"""A tiny model whose keys weigh little where they are large, so that a plan with key offsets has key scales too."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

SHARES = 4.0, 0.25  # of queries' channels, in turn; powers of two, so that nothing is rounded


def unbalance(folder: Path) -> None:
    """Multiply queries' channels by SHARES and divide keys' by them: products, and so the model's text, stay.

    Channels i and half + i, which RoPE turns into each other, get the same share.
    """
    file, head_dim = folder / "model.safetensors", json.loads((folder / "config.json").read_text())["head_dim"]
    weights = load_file(file)
    half = torch.tensor(SHARES).repeat(head_dim // 4)
    share = torch.cat((half, half))[:, None]
    for kind, factor in (("q_proj.weight", share), ("k_proj.weight", 1 / share)):
        for name in weights:
            if name.endswith(kind):
                weights[name].view(-1, head_dim, weights[name].shape[1]).mul_(factor)
    save_file(weights, file, metadata={"format": "pt"})
