"""How long the steps of a build take: their operations at the rate of plain matrix products of the device at hand.

It is an estimate. Rates are measured in a second or so, while others may use the machine too; attention, norms and
activations take time but count no operations, and nobody knows how long fetching a model or building an engine takes.
"""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pdtrim_deploy.local.compute import Compute
from pdtrim_deploy.local.duration import duration
from pdtrim_deploy.models.weights import ModelSizes
from pdtrim_deploy.pipeline.step_cost import StepCost
from pdtrim_deploy.recipe import Recipe

MOST_ROWS, MOST_WIDTH = 512, 4096  # of a product that is measured: a larger one is no faster, and takes longer
_MEASURED = 0.2  # seconds


@dataclass(frozen=True)
class Rates:
    """What this machine does in a second just now.

    Attributes:
        products: operations of plain matrix products as wide as the model's; None where that is not known here.
        hashed: bytes of which SHA-256 is made.
        basis: what `products` is of, or why it is not known, as the end of a sentence.

    """

    products: float | None
    hashed: float
    basis: str

    def seconds(self, cost: StepCost) -> float | None:
        """Of a step; None where that is not known."""
        return cost.seconds(self.products, self.hashed)

    def time(self, cost: StepCost) -> str:
        """Of a step, for a reader."""
        seconds = self.seconds(cost)
        return "time not known" if seconds is None else f"about {duration(seconds)}"

    def sentence(self, costs: Mapping[str, StepCost]) -> str:
        """What these steps take together, and what that is worth."""
        times = {name: self.seconds(cost) for name, cost in costs.items()}
        known = [seconds for seconds in times.values() if seconds is not None]
        if self.products is None:
            return f"time of operations is not known here: {self.basis}"
        unknown = dict.fromkeys(name.partition("/")[0] for name, seconds in times.items() if seconds is None)
        but = f" without {' and '.join(unknown)}" if unknown else ""
        return f"about {duration(sum(known))} in all{but}, an estimate: operations at {self.basis}"


def measure(recipe: Recipe, config: Mapping[str, Any], compute: Compute) -> Rates:
    """The rates of `compute`'s first device, for the recipe's model, in the dtype that the recipe measures in.

    Products are those of the model's MLPs, or of experts, to each of which a part of eight sequences comes.
    """
    sizes, dtype, device = ModelSizes.of(config), recipe.model.measured_in, compute.devices[0]
    tokens = recipe.calibration.length
    rows = tokens if sizes.expert_tokens == 1 else max(1, round(8 * tokens * sizes.expert_tokens))
    if lack := compute.lack:
        return Rates(None, _hash_rate(), f"{lack}; run this on the machine with that GPU")
    try:
        products = _product_rate(rows, sizes.hidden, sizes.expert_width, device, dtype)
    except ImportError:
        return Rates(None, _hash_rate(), "torch is not installed")
    except RuntimeError as error:  # no memory left on a GPU, or no kernels for it
        reason = re.split(r"\. |\n", str(error))[0]
        return Rates(None, _hash_rate(), f"{device} computes nothing now ({reason})")
    speed = f"{products / 1e12:,.1f} TFLOP/s" if products >= 1e12 else f"{products / 1e9:,.1f} GFLOP/s"
    return Rates(products, _hash_rate(), f"{speed}, the rate of plain {dtype} matrix products on {device} just now")


def _product_rate(rows: int, hidden: int, inner: int, device: str = "cpu", dtype: str = "float32") -> float:
    """Operations a second of `[rows, hidden] x [hidden, inner]`, or of a part of it whose product is quick."""
    import torch

    rows, hidden, inner = min(rows, MOST_ROWS), min(hidden, MOST_WIDTH), min(inner, MOST_WIDTH)
    together = 1 if device == "cpu" else 16  # products that a GPU is waited for
    left, right = (
        torch.randn(shape, device=device).to(getattr(torch, dtype)) for shape in ((rows, hidden), (hidden, inner))
    )
    part = left[:32]
    float((part @ right)[0, 0])  # whatever a first product makes ready
    began = time.perf_counter()
    float((part @ right)[0, 0])
    most_rows = int(_MEASURED * len(part) / (time.perf_counter() - began))
    left = left[: max(1, most_rows)]
    began, times = time.perf_counter(), 0
    while (spent := time.perf_counter() - began) < _MEASURED:
        for _ in range(together):
            out = left @ right
        float(out[0, 0])
        times += together
    return 2 * len(left) * hidden * inner * times / spent


def _hash_rate() -> float:
    """Bytes a second, in a tenth of a second or less."""
    block = bytes(1 << 24)
    began = time.perf_counter()
    hashlib.sha256(block)
    return len(block) / (time.perf_counter() - began)
