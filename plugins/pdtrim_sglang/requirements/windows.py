"""Windows of a loaded model's layers: those of the plan's model, in a pool that has their rows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pdtrim_deploy.plan import PDPlan, Stage

if TYPE_CHECKING:
    from pdtrim_sglang.pool import PoolView


def check_windows(plan: PDPlan, stage: Stage, model: Any, pool: PoolView, backend: str | None = None) -> None:
    """Raise RuntimeError when layers of the loaded model attend to other windows than the plan's model."""
    if pool.windowed is not None and backend == "torch_native" and pool.windowed.of_slot.device.type != "cpu":
        raise RuntimeError(
            "pdtrim: attention backend torch_native reads SGLang's pool of windows by slots of whole layers, which are "
            "other rows: start with --disable-hybrid-swa-memory"
        )
    cut = any(send.mode == "sparse" for send in plan.kv)
    if stage == "decode" and cut and pool.windowed is not None:
        raise RuntimeError(
            "pdtrim: the plan cuts layers, which have no slots beside SGLang's pool of windows: start decode with "
            "--disable-hybrid-swa-memory"
        )
    loaded = loaded_windows(model, len(plan.kv_blocks(stage)))
    for layer, block in enumerate(plan.kv_blocks(stage)):
        if (window := plan.model.window(block)) != loaded[layer]:
            raise RuntimeError(
                f"pdtrim: layer {layer} attends to {_attended(window)} by the plan, to {_attended(loaded[layer])} as "
                f"this worker has loaded it: serve the bundle's {stage} checkpoint with SGLang's own model class"
            )


def loaded_windows(model: Any, layers: int) -> tuple[int | None, ...]:
    """By layer of SGLang's model, to how many tokens a query attends, itself among them; None: to all before it.

    SGLang counts those before the query.
    """
    from sglang.srt.layers.radix_attention import RadixAttention

    sizes = {m.layer_id: m.sliding_window_size for m in model.modules() if isinstance(m, RadixAttention)}
    windows = [sizes.get(layer, -1) for layer in range(layers)]
    return tuple(None if window == -1 else window + 1 for window in windows)


def _attended(window: int | None) -> str:
    return "all tokens" if window is None else f"the last {window} tokens"


def check_window(config: Any, context_length: int | None) -> None:
    """Raise RuntimeError when texts may be longer than what a model with sliding windows attends to.

    SGLang 0.5.23's llama.py, mistral.py, qwen2.py and qwen3.py attend to all tokens, so such a model is itself up to
    its window only. `config` is its Hugging Face one; `context_length` the worker's option.
    """
    window: int | None = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if window is None or (kinds is not None and "sliding_attention" not in kinds):
        return
    if (context_length or config.max_position_embeddings) > window:
        raise RuntimeError(
            f"pdtrim: layers of this model attend to the last {window} tokens, in SGLang to all: start with "
            f"--context-length {window}"
        )
