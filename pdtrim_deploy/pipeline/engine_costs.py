"""Memory of building an engine, before a weight is read. No torch."""

from __future__ import annotations

from pdtrim_deploy.models.footprint import PROGRAM
from pdtrim_deploy.models.weights import ModelSizes
from pdtrim_deploy.plan import NativeDtype
from pdtrim_deploy.plan.wire import ITEM_BYTES
from pdtrim_deploy.recipe.targets import OnnxTarget, Target

_FLOAT = 4
EXTERNAL = 2e9  # bytes of weights from which on a graph has them in a file of their own (`graph.build`)


def engine_memory(section: Target, sizes: ModelSizes, dtype: NativeDtype, lost: int = 0) -> float:
    """Bytes at most, of a stage that is served in `dtype` and loses no more than `lost` blocks.

    A process that holds all weights has them three times, in float32. A large graph for onnxruntime is written tensor
    by tensor, and checked against a model of which a block is there at a time; whether it is large, the stage decides.
    """
    native = isinstance(section, OnnxTarget) and section.weights == "native"
    least = sizes.total - lost * sizes.block
    if native and least * ITEM_BYTES[getattr(section, "dtype", None) or dtype] > EXTERNAL:
        return graph_memory(sizes)
    return PROGRAM + 3.0 * _FLOAT * sizes.total


def graph_memory(sizes: ModelSizes) -> float:
    """Of a graph whose weights have a file of their own, with its check; pages of that file are not counted."""
    return PROGRAM + _FLOAT * (sizes.ends + 2.0 * sizes.block)
