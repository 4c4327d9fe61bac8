"""The recipe of a tiny pair on a text of words."""

from __future__ import annotations

from pathlib import Path

from pdtrim_deploy.recipe import Recipe


def words_recipe(source: Path, text: Path, kv: dict[str, object], dtype: str = "float32", **sections: object) -> Recipe:
    """Prefill loses a block, decode two; `text` is a folder."""
    corpus = {"corpus": f"dir:{text}", "sequences": 2}
    data = {
        "name": "tiny",
        "model": {"source": f"hf:{source}", "dtype": dtype},
        "calibration": corpus | {"length": 120},
        "pruning": {"method": "cosine", "prefill_blocks": 1, "decode_blocks": 2},
        "kv": kv,
        "evaluation": corpus | {"prompt_tokens": 120, "continuation_tokens": 8},
    }
    return Recipe.model_validate(data | sections)
