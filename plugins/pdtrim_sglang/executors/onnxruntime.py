"""Executor `onnxruntime`: the stage graph on the CPU, float32, its attention a callback into SGLang's backend."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.plan import PDPlan
from pdtrim_deploy.worker.config import EngineConfig
from pdtrim_sglang.executors.base import NO_SENDS, Attention

GRAPH, EMBEDDING = "model.onnx", "embed_tokens"  # as pdtrim_builders.graph names them


class OnnxRuntimeExecutor:
    """`StageExecutor` on `pdtrim_builders.runtime_onnx`; as many threads as torch has in this process."""

    def __init__(
        self, engine: EngineConfig, plan: PDPlan, attention: Attention, embedding: Tensor | None = None
    ) -> None:
        try:
            from pdtrim_builders.runtime_onnx import OnnxStage
        except ImportError as error:
            raise RuntimeError(
                f"pdtrim: executor onnxruntime needs {error.name or error} in the serve environment; run: make setup"
            ) from error
        try:
            shared = None if embedding is None else {EMBEDDING: embedding}
            self._stage = OnnxStage(Path(engine.path) / GRAPH, attention, torch.get_num_threads(), shared)
        except UserError as error:
            raise RuntimeError(f"pdtrim: {error}") from error
        facts = {key: self._stage.metadata.get(f"pdtrim.{key}") for key in ("stage", "plan_digest")}
        expected = {"stage": engine.stage, "plan_digest": plan.digest}
        for key, value in expected.items():
            if facts[key] != value:
                raise RuntimeError(
                    f"pdtrim: {engine.path} is an engine of {key} {facts[key]}, this worker serves {value}; "
                    "build the bundle again"
                )
        self.dtype, self.packs = self._stage.dtype, bool(self._stage.packed_outputs)

    def run(
        self,
        input_ids: Tensor,
        positions: Tensor,
        rows: Mapping[str, Tensor] = NO_SENDS,
        packed: Mapping[str, Tensor] = NO_SENDS,
    ) -> Tensor:
        return self._stage.run(input_ids, positions, rows, packed).hidden
