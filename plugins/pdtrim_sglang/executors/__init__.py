"""Engines by the name of what executes them. `torch`, SGLang's own model, needs none."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from pdtrim_deploy.plan import PDPlan
from pdtrim_deploy.worker.config import EngineConfig
from pdtrim_sglang.executors.base import Attention, StageExecutor

__all__ = ["EXECUTORS", "Attention", "StageExecutor", "load_engine"]


def _onnxruntime(engine: EngineConfig, plan: PDPlan, attention: Attention, embedding: Tensor | None) -> StageExecutor:
    from pdtrim_sglang.executors.onnxruntime import OnnxRuntimeExecutor

    return OnnxRuntimeExecutor(engine, plan, attention, embedding)


def _tensorrt(engine: EngineConfig, plan: PDPlan, attention: Attention, embedding: Tensor | None) -> StageExecutor:
    from pdtrim_sglang.executors.tensorrt import TensorRTExecutor

    return TensorRTExecutor.load(engine, plan, attention)


EXECUTORS: dict[str, Callable[[EngineConfig, PDPlan, Attention, Tensor | None], StageExecutor]] = {
    "onnxruntime": _onnxruntime,
    "tensorrt": _tensorrt,
}


def load_engine(
    engine: EngineConfig, plan: PDPlan, attention: Attention, embedding: Tensor | None = None
) -> StageExecutor:
    """The engine, ready to run.

    Args:
        embedding: `[vocabulary, hidden]`, when this process holds it anyway (a tied LM head): an engine on the CPU then
            reads it in place instead of loading its own.

    Raises:
        RuntimeError: unknown executor, a missing library, an engine of another plan, stage or dtype.

    """
    if engine.executor not in EXECUTORS:
        raise RuntimeError(f"pdtrim: executor {engine.executor!r} is unknown; use torch, {', '.join(EXECUTORS)}")
    return EXECUTORS[engine.executor](engine, plan, attention, embedding)
