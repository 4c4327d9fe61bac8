"""Executor `tensorrt`: an engine on SGLang's current stream, its attention a call back into SGLang's backend.

Every input and the hidden states have one buffer for life, so that a CUDA graph which SGLang captures around a decode
step stays true: it finds the same addresses, nothing is allocated, and no other shape uses its context. Only prefill,
which runs without CUDA graphs, binds other memory: the staging arena's, for the rows it sends.

Written against TensorRT 10 and 11's Python interface and tested with a stand-in for it; never run on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

import torch
from pdtrim_tensorrt.plugin_library import AttentionCall
from torch import Tensor

from pdtrim_deploy.bundle.engine import RESULT, TargetResult
from pdtrim_deploy.plan import PDPlan
from pdtrim_deploy.worker.config import EngineConfig
from pdtrim_sglang.executors.base import NO_SENDS, Attention
from pdtrim_sglang.executors.contexts import Contexts
from pdtrim_sglang.executors.session import Session, View

PLAN, LIBRARY = "engine.plan", "libpdtrim_tensorrt.so"
HIDDEN = "hidden_states"


class Callback(Protocol):
    """What `pdtrim_tensorrt.plugin_library.PluginLibrary` offers: the attention of this process' engines."""

    error: BaseException | None

    def set_attention(self, attend: Callable[[AttentionCall], None]) -> None:
        """Attend through `attend` from now on."""


class TensorRTExecutor:
    """`StageExecutor`.

    Args:
        view: makes a tensor of device memory.
        stream: torch's current cudaStream_t.
        capturing: whether a CUDA graph is being captured on it.

    """

    def __init__(
        self,
        session: Session,
        library: Callback,
        attention: Attention,
        device: torch.device,
        view: View,
        stream: Callable[[], int],
        capturing: Callable[[], bool],
    ) -> None:
        self._contexts = Contexts(session, capturing)
        self._library, self._attention = library, attention
        self._view, self._stream = view, stream
        shape, self.dtype = session.outputs[HIDDEN]
        self.most_tokens = session.inputs["input_ids"]
        self._feeds = {
            name: torch.zeros(most, dtype=torch.int64, device=device) for name, most in session.inputs.items()
        }
        self._hidden = torch.empty(self.most_tokens, shape[1], dtype=self.dtype, device=device)
        self._nowhere = torch.empty(256, dtype=torch.uint8, device=device)  # for outputs without rows
        self._sends = tuple(name for name in session.outputs if name != HIDDEN)
        # An engine that encodes rows itself writes codes and scales of a whole batch: those cannot be cut by request.
        self.packs = bool(self._sends) and all(session.outputs[name][1] == self.dtype for name in self._sends)
        library.set_attention(self._attend)

    @classmethod
    def load(cls, engine: EngineConfig, plan: PDPlan, attention: Attention) -> TensorRTExecutor:
        """Load `engine.plan` and the plugin library beside it.

        Raises:
            RuntimeError: no TensorRT, no GPU, no library, or an engine of another plan or stage.

        """
        folder = Path(engine.path)
        try:
            import tensorrt
        except ImportError:
            raise RuntimeError(
                "pdtrim: executor tensorrt needs Python package tensorrt; use --executor torch"
            ) from None
        if not torch.cuda.is_available():
            raise RuntimeError("pdtrim: executor tensorrt needs a GPU and this machine has none; use --executor torch")
        check_engine(folder, engine, plan)
        from pdtrim_tensorrt.plugin_library import PluginLibrary

        from pdtrim_sglang.executors.tensorrt_session import TensorRTSession, device_view

        device = torch.device("cuda", torch.cuda.current_device())
        library = PluginLibrary(folder / LIBRARY)
        session = TensorRTSession.load(tensorrt, folder / PLAN, folder / LIBRARY)
        return cls(
            session,
            library,
            attention,
            device,
            device_view(device),
            lambda: torch.cuda.current_stream().cuda_stream,
            torch.cuda.is_current_stream_capturing,
        )

    def run(
        self,
        input_ids: Tensor,
        positions: Tensor,
        rows: Mapping[str, Tensor] = NO_SENDS,
        packed: Mapping[str, Tensor] = NO_SENDS,
    ) -> Tensor:
        """The result is overwritten by the next call, which comes later on the same stream."""
        tokens = len(input_ids)
        if tokens > self.most_tokens:
            raise RuntimeError(
                f"pdtrim: a batch of {tokens} tokens, the engine takes {self.most_tokens}: start with "
                f"--chunked-prefill-size {self.most_tokens} and as many --max-running-requests at most"
            )
        values = {"input_ids": input_ids, "positions": positions, **rows}
        context = self._contexts.of({name: len(values.get(name, ())) for name in self._feeds})
        for name, feed in self._feeds.items():
            if name in values:
                feed[: len(values[name])].copy_(values[name], non_blocking=True)
            context.bind(name, feed.data_ptr())
        context.bind(HIDDEN, self._hidden.data_ptr())
        for name in self._sends:
            context.bind(name, packed.get(name, self._nowhere).data_ptr() or self._nowhere.data_ptr())
        self._library.error = None
        if not context.enqueue(self._stream()):
            raise self._library.error or RuntimeError(
                "pdtrim: TensorRT could not enqueue the engine; see its log above"
            )
        return self._hidden[:tokens]

    def _attend(self, call: AttentionCall) -> None:
        if call.stream != self._stream():
            raise RuntimeError("pdtrim: the engine runs on another stream than SGLang's attention would")
        dtype, width = getattr(torch, call.dtype), call.num_kv_heads * call.head_dim
        shapes = {"q": call.width, "k": width, "v": width}
        q, k, v = (self._view(getattr(call, name), (call.tokens, size), dtype) for name, size in shapes.items())
        output = self._view(call.output, tuple(q.shape), dtype)
        output.copy_(self._attention(call.layer_id, q, k, v).view(q.shape))


def check_engine(folder: Path, engine: EngineConfig, plan: PDPlan) -> None:
    """RuntimeError unless the folder has the stage's engine of this plan, and the library that attends through us."""
    try:
        built = TargetResult.model_validate_json((folder / RESULT).read_text())
    except (OSError, ValueError) as error:
        raise RuntimeError(f"pdtrim: {folder} holds no engine ({error}); build the bundle again") from None
    if (built.stage, built.plan_digest) != (engine.stage, plan.digest):
        raise RuntimeError(
            f"pdtrim: {folder} is an engine of {built.stage} for plan {built.plan_digest}, this worker serves "
            f"{engine.stage} of plan {plan.digest}; build the bundle again"
        )
    if LIBRARY in str(built.details.get("plugin_library", "")):
        raise RuntimeError(
            f"pdtrim: the engine in {folder} carries its own {LIBRARY}, whose attention nobody could answer; build it "
            "without plugin_library"
        )
    if not (folder / LIBRARY).is_file():
        raise RuntimeError(
            f"pdtrim: {folder} has no {LIBRARY}; build it from plugins/pdtrim_tensorrt/library and put it there"
        )
