"""RoPE parameters of a GGUF file as transformers names them: llama3, yarn and linear, or none.

llama.cpp keeps Llama 3.1's scaling as a tensor, `rope_freqs.weight`: for each rotary frequency what it is divided by
(convert_hf_to_gguf.py, LlamaModel.generate_extra_tensors). The parameters are found again from it, and taken only if
they give back every factor. YaRN's are keys of the metadata; llama.cpp and transformers share its defaults.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pdtrim_deploy.errors import UserError

FREQUENCIES = "rope_freqs.weight"
_KNOWN = ("factor", "original_context_length", "type")
_PUBLISHED = 1.0, 4.0, 8192.0  # low and high frequency factor and first context of Llama 3.1, 3.2 and 3.3
_CLOSE = 1e-5  # relative; the tensor is float32


def rope_scaling(
    meta: Mapping[str, Any], arch: str, factors: Sequence[float] | None, theta: float, path: Path
) -> dict[str, Any] | None:
    """`rope_scaling` of config.json, None where RoPE is not scaled.

    Args:
        factors: of `rope_freqs.weight`, one a rotary frequency; None: the file has none.
        theta: RoPE's base.

    Raises:
        UserError: a scaling that transformers would compute otherwise, or that cannot be found again.

    """
    prefix = f"{arch}.rope.scaling."
    keys = {name.removeprefix(prefix): value for name, value in meta.items() if name.startswith(prefix)}
    kind = keys.get("type", "none")
    if factors is not None:
        if kind not in ("none", "llama3"):
            raise UserError(
                f"{path}: {FREQUENCIES} beside RoPE scaling {kind!r} is not known; give the HF folder as hf:DIR"
            )
        return _llama3(factors, theta, keys.get("original_context_length"), path)
    if kind == "none":
        return None
    if kind not in ("yarn", "linear") or (unknown := sorted(set(keys) - set(_KNOWN))):
        what = f"RoPE scaling {kind!r}" + (f" with {', '.join(unknown)}" if kind in ("yarn", "linear") else "")
        raise UserError(f"{path}: {what} cannot be read back from GGUF exactly; give the HF folder as hf:DIR")
    scaling = {"rope_type": kind, "factor": _number(keys["factor"])}
    if kind == "yarn":
        scaling["original_max_position_embeddings"] = int(keys["original_context_length"])
    return scaling


def _llama3(factors: Sequence[float], theta: float, context: int | None, path: Path) -> dict[str, Any]:
    factor = _number(max(factors))
    for low, high, original in _candidates(factors, factor, theta, context):
        again = llama3_factors(len(factors), theta, factor, low, high, original)
        if all(math.isclose(a, b, rel_tol=_CLOSE) for a, b in zip(again, factors, strict=True)):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": low,
                "high_freq_factor": high,
                "original_max_position_embeddings": int(original),
            }
    raise UserError(f"{path}: {FREQUENCIES} is not the scaling of Llama 3; give the HF folder as hf:DIR")


def llama3_factors(
    count: int, theta: float, factor: float, low: float, high: float, original: float
) -> Iterator[float]:
    """What each of `count` frequencies is divided by (transformers, modeling_rope_utils: llama3)."""
    for at in range(count):
        turns = original / (2 * math.pi * theta ** (at / count))  # of the frequency, in the first context
        smooth = min(max((turns - low) / (high - low), 0.0), 1.0)
        yield 1 / ((1 - smooth) / factor + smooth)


def _candidates(
    factors: Sequence[float], factor: float, theta: float, context: int | None
) -> Iterator[tuple[float, float, float]]:
    """The published parameters, then those that fit: all three may be scaled alike, so that the low one is 1."""
    low, high, original = _PUBLISHED
    yield low, high, float(context or original)
    between = [at for at, value in enumerate(factors) if 1 < value < factor * (1 - _CLOSE)]
    if len(between) < 2:
        return
    turns = [theta ** (-at / len(factors)) / (2 * math.pi) for at in (between[0], between[-1])]
    smooth = [(1 / factors[at] - 1 / factor) / (1 - 1 / factor) for at in (between[0], between[-1])]
    slope = (smooth[1] - smooth[0]) / (turns[1] - turns[0])  # original / (high - low)
    start = smooth[0] - slope * turns[0]  # -low / (high - low)
    if start < 0:
        high = _number(1 - 1 / start)
        yield 1.0, high, float(round(slope * (high - 1)))


def _number(value: float) -> float:
    """GGUF keeps float32: six digits bring back the number that the author wrote."""
    return float(f"{float(value):.6g}")
