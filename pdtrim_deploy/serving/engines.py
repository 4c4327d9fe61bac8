"""Which executor computes a stage, and the engine in the bundle that it runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from pdtrim_deploy.bundle import Bundle, engine_folder
from pdtrim_deploy.errors import UserError
from pdtrim_deploy.plan import Stage
from pdtrim_deploy.worker.config import EngineConfig

Executor = Literal["torch", "onnxruntime", "tensorrt"]
EXECUTORS: tuple[Executor, ...] = get_args(Executor)
TARGETS: dict[Executor, str] = {"onnxruntime": "onnx", "tensorrt": "tensorrt"}
DEVICES: dict[Executor, str] = {"onnxruntime": "cpu", "tensorrt": "cuda"}


@dataclass(frozen=True)
class Executors:
    """The executor of each stage; `torch` is SGLang's own model."""

    prefill: Executor = "torch"
    decode: Executor = "torch"

    def of(self, stage: Stage) -> Executor:
        """The stage's executor."""
        return self.prefill if stage == "prefill" else self.decode


@dataclass(frozen=True)
class Engine:
    """One built engine: the folder that a target of `pdtrim_builders` wrote.

    `most_tokens` is the largest batch that it takes; None: any.
    """

    executor: Executor
    stage: Stage
    path: Path
    most_tokens: int | None = None

    def as_config(self) -> EngineConfig:
        """The worker's configuration of this engine."""
        return EngineConfig(executor=self.executor, stage=self.stage, path=str(self.path.resolve()))


def find_engine(bundle: Bundle, stage: Stage, executor: Executor, device: str) -> Engine | None:
    """The bundle's engine for `executor`, None for `torch`.

    Raises:
        UserError: no such executor, no such engine in the bundle, or one that this worker could not run.

    """
    if executor == "torch":
        return None
    if executor not in EXECUTORS:
        raise UserError(f"executor {executor!r} is unknown; use {', '.join(EXECUTORS)}")
    if device != DEVICES[executor]:
        raise UserError(f"executor {executor} runs on {DEVICES[executor]}, the workers on {device}; use executor torch")
    folder = bundle.engine_dir(TARGETS[executor], stage)
    result = bundle.manifest.engines[engine_folder(TARGETS[executor], stage)]
    if (pool := bundle.plan.model.pool_dtype) != "native":
        raise UserError(
            f"executor {executor} writes KV as it computes it, the plan's KV pool is {pool}; use executor torch"
        )
    built, most = result.dtype, result.details.get("most_tokens")
    dtype = bundle.plan.model.kv_dtype
    if executor == "onnxruntime" and dtype != "float32":  # its Python ops, and so our attention, support no other dtype
        raise UserError(f"executor onnxruntime computes in float32, the bundle in {dtype}; use model.dtype float32")
    if built != dtype:
        raise UserError(f"{folder}: an engine in {built}, the bundle is in {dtype}; build it in {dtype}")
    return Engine(executor, stage, folder, most if isinstance(most, int) else None)


def require_batches(engine: Engine | None, chunk: int | None, requests: int | None, ranks: int) -> None:
    """UserError: a worker of these options would give its engine more than the engine takes.

    `chunk` is `--chunked-prefill-size` (-1: whole prompts), `requests` `--max-running-requests`, None where SGLang or
    `engine_limits` chooses; `ranks` is the worker's tensor parallelism.
    """
    if engine is None:
        return
    if ranks > 1:
        raise UserError(f"the {engine.stage} engine computes all heads in one rank, not in {ranks}; use executor torch")
    most = engine.most_tokens
    if most is None:
        return
    if engine.stage == "prefill" and chunk is not None and not 0 < chunk <= most:
        raise UserError(
            f"--chunked-prefill-size {chunk}: the prefill engine takes at most {most} tokens; give {most} or less, or "
            "build it with more `most_tokens`"
        )
    if engine.stage == "decode" and requests is not None and requests > most:
        raise UserError(
            f"--max-running-requests {requests}: the decode engine takes at most {most}; give {most} or less, or build "
            "it with more `most_tokens`"
        )


def engine_limits(engine: Engine | None) -> dict[str, int]:
    """SGLang's options that keep batches within the engine, where nobody chose them."""
    if engine is None or engine.most_tokens is None:
        return {}
    option = "--chunked-prefill-size" if engine.stage == "prefill" else "--max-running-requests"
    return {option: engine.most_tokens}
