"""Commands and YAML for a stage in TensorRT-LLM: `trtllm-build` up to 1.2.x, `trtllm-serve disaggregated` after."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pdtrim_builders.graph.stage import StageModel

HOST = "127.0.0.1"
HF_FP8 = "hf-fp8"  # the quantised HF checkpoint, in the engine's folder


@dataclass(frozen=True)
class Serving:
    """Versions to write for, limits and ports that the commands state; `transceiver` moves the KV."""

    versions: tuple[str, ...]
    max_batch_size: int
    max_input_len: int
    max_seq_len: int
    transceiver: str
    prefill_port: int
    decode_port: int
    port: int


def same_layers(stage: StageModel) -> bool:
    """Whether layer j is the same block in both stages, which TensorRT-LLM's transceiver takes for granted."""
    return stage.plan.prefill_layers == stage.plan.decode_layers


def write_serving(
    stage: StageModel, folder: Path, dtype: str, sizes: Sequence[int], serving: Serving, fp8: bool = False
) -> None:
    """Write `commands.txt` and, for 1.3, `llm-api.yaml` and `disaggregated.yaml` (the same for both stages).

    Paths are relative. With `fp8` the HF checkpoint is the quantised one, in this folder or the other stage's.
    """
    lines = [f"# {stage.stage} stage in TensorRT-LLM. Run these in this folder, on a GPU host."]
    if "1.2" in serving.versions:
        lines += ["", "# 1.2.x, the last with engines: build one of these splits"]
        lines += [shlex.join(_build(dtype, size, serving)) for size in sizes]
    if "1.3" in serving.versions:
        _write(folder / "llm-api.yaml", _llm_api(stage, serving))
        _write(folder / "disaggregated.yaml", _disaggregated(serving))
        lines += ["", *_serve(stage, folder, sizes, serving, fp8)]
    (folder / "commands.txt").write_text("\n".join(lines) + "\n")


def _serve(stage: StageModel, folder: Path, sizes: Sequence[int], serving: Serving, fp8: bool) -> list[str]:
    lines = ["# 1.3 and later: serve the HF checkpoint, then, when both stages run, start the front"]
    if fp8:
        model = folder / HF_FP8 if same_layers(stage) else folder.parent / "decode" / HF_FP8
    else:
        model = stage.path if same_layers(stage) else stage.path.parent / "decode"
    if stage.stage == "prefill" and not same_layers(stage):
        lines.append("# (the decode model here too: its transceiver pairs layers by number, and the stages differ)")
    port = serving.prefill_port if stage.stage == "prefill" else serving.decode_port
    serve = ["trtllm-serve", os.path.relpath(model, folder), "--host", HOST, "--port", str(port)]
    serve += ["--backend", "pytorch", "--tp_size", str(max(sizes)), "--config", "llm-api.yaml"]
    return [*lines, shlex.join(serve), shlex.join(["trtllm-serve", "disaggregated", "-c", "disaggregated.yaml"])]


def _build(dtype: str, size: int, serving: Serving) -> list[str]:
    options = {
        "checkpoint_dir": f"tp{size}",
        "output_dir": f"engine-tp{size}",
        "gemm_plugin": "auto",
        "gpt_attention_plugin": dtype,
        "kv_cache_type": "paged",
        "use_paged_context_fmha": "enable",
        "max_batch_size": serving.max_batch_size,
        "max_input_len": serving.max_input_len,
        "max_seq_len": serving.max_seq_len,
        "max_num_tokens": serving.max_input_len,
        "workers": size,
    }
    return ["trtllm-build", *(part for key, value in options.items() for part in (f"--{key}", str(value)))]


def _llm_api(stage: StageModel, serving: Serving) -> dict[str, Any]:
    transceiver = {"backend": serving.transceiver, "max_tokens_in_buffer": serving.max_input_len}
    limits = {"max_batch_size": serving.max_batch_size, "max_seq_len": serving.max_seq_len}
    overlap = {"disable_overlap_scheduler": True} if stage.stage == "prefill" else {}
    return overlap | limits | {"max_num_tokens": serving.max_input_len, "cache_transceiver_config": transceiver}


def _disaggregated(serving: Serving) -> dict[str, Any]:
    def server(port: int) -> dict[str, Any]:
        return {"num_instances": 1, "urls": [f"{HOST}:{port}"]}

    return {
        "hostname": HOST,
        "port": serving.port,
        "backend": "pytorch",
        "context_servers": server(serving.prefill_port),
        "generation_servers": server(serving.decode_port),
    }


def _write(path: Path, data: dict[str, Any]) -> None:
    path.write_text(yaml.safe_dump(data, sort_keys=False))
