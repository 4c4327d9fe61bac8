"""What the faults are injected into: plans and settings that take unlike ways through the plugin."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from unlikestages import unlike_plan, write_stages

from pdtrim_deploy.models import open_checkpoint
from pdtrim_deploy.plan import KVSend, PDPlan
from pdtrim_deploy.plan.wire import PoolDtype
from pdtrim_deploy.serving import Engine


@dataclass(frozen=True)
class ServedPath:
    """How a pair is served. `cut`: by a plan that leaves rows out; `engine`: prefill computes in onnxruntime.

    `by_layer`: rows of finished layers leave while prefill computes later ones.
    """

    name: str
    cut: bool = True
    engine: bool = False
    tp_prefill: int = 1
    tp_decode: int = 1
    page_size: int | None = None
    decode_args: tuple[str, ...] = ()
    by_layer: bool = False
    pool_dtype: PoolDtype = "native"

    @property
    def reuses(self) -> bool:
        """Whether decode keeps rows of earlier prompts."""
        return bool(self.decode_args)


REUSE = ("--disaggregation-decode-enable-radix-cache",)
PATHS = {
    path.name: path
    for path in (
        ServedPath("cut layers, an engine", engine=True),
        ServedPath("TP 2 to 1", tp_prefill=2, page_size=16),
        ServedPath("TP 1 to 2", tp_decode=2, page_size=16),
        ServedPath("decode's radix cache", cut=False, page_size=16, decode_args=REUSE),
        ServedPath("cut layers, decode's radix cache, sent by layer", page_size=16, decode_args=REUSE, by_layer=True),
        ServedPath("cut layers, an fp8 pool", page_size=16, pool_dtype="fp8_e4m3"),
    )
}


@dataclass(frozen=True)
class Stages:
    """A tiny bundle: `prefill` and `decode` in `folder`, an engine for prefill in `engine`."""

    folder: Path
    plan: PDPlan
    engine: Engine | None


def tiny_stages(model: Path, folder: Path, cache, path: ServedPath, n_last: int) -> Stages:
    """Prefill loses a block, decode two. Layers send unlike numbers of rows, or all of them in unlike dtypes."""
    checkpoint = open_checkpoint(model, cache)
    if path.cut:
        sparse = KVSend(mode="sparse", n_first=4, n_last=n_last)
        kv = (KVSend(), sparse, sparse.model_copy(update={"n_last": 9}), sparse)
    else:
        kv = tuple(KVSend(wire_dtype=wire) for wire in ("int8", "native", "fp8", "native" if n_last % 2 else "int8"))
    plan = unlike_plan(checkpoint, kv, path.pool_dtype)
    write_stages(checkpoint, folder, plan)
    if not path.engine:
        return Stages(folder, plan, None)
    from pdtrim_builders import build_target

    build_target("onnx", folder / "prefill", folder / "engine")
    return Stages(folder, plan, Engine("onnxruntime", "prefill", folder / "engine"))
