"""One TensorRT build in a process of its own: `python -m pdtrim_builders.targets.tensorrt_worker JOB.json`.

Writes its answer, or `{"error": one sentence}`, as JSON to the job's `answer`. Works on tensorrt_rtx and tensorrt.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from pdtrim_deploy.errors import UserError


def build(job: dict[str, Any]) -> dict[str, Any]:
    """Parse, count the plugins, build, check the plan.

    The job: module, graph, plan, plugin_library (or None), plugins (nodes expected by op), compute_capabilities (of
    this module's enumeration; empty for the GPU at hand), most_tokens, usual_tokens, magic (or None).

    Raises UserError: the graph does not parse, a plugin was inlined, TensorRT built nothing or something odd.
    """
    trt = importlib.import_module(job["module"])
    log = _logger(trt)
    builder = trt.Builder(log)
    creators = _register_plugins(trt, job["plugin_library"])  # the registry does not keep Python creators
    network = builder.create_network(_flags(trt))
    parser = trt.OnnxParser(network, log)
    started = time.monotonic()
    if not parser.parse_from_file(job["graph"]):
        raise UserError(f"its parser refuses the graph: {_first_error(parser)}")
    parsed = time.monotonic()
    plugins = count_plugins(trt, network)
    if plugins != job["plugins"]:
        raise UserError(f"PLUGIN layers are {plugins}, the graph has {job['plugins']}: some were inlined or lost")
    config = builder.create_builder_config()
    config.max_aux_streams = 0  # attention and what is sent run on the stream of SGLang's batch, and on no other
    _set_capabilities(trt, config, job["compute_capabilities"])
    if job["plugin_library"]:
        config.plugins_to_serialize = [job["plugin_library"]]
    config.add_optimization_profile(_profile(builder, network, job["usual_tokens"], job["most_tokens"]))
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise UserError(f"it built nothing: {log.worst or 'no reason given'}")
    built = time.monotonic()
    plan = bytes(engine)
    _check_plan(plan, plugins, job)
    Path(job["plan"]).write_bytes(plan)
    del creators
    return {
        "version": trt.__version__,
        "plugins": plugins,
        "layers": network.num_layers,
        "inputs": [_described(network.get_input(i)) for i in range(network.num_inputs)],
        "outputs": [_described(network.get_output(i)) for i in range(network.num_outputs)],
        "parse_seconds": round(parsed - started, 2),
        "build_seconds": round(built - parsed, 2),
        "aux_streams": config.max_aux_streams,
    }


def count_plugins(trt: Any, network: Any) -> dict[str, int]:
    """PLUGIN layers by op. Named as its node: `kv_send_{layer}`, `l{layer}.attention`, `l{layer}.kv_write`."""
    from pdtrim_tensorrt.python_forms import plugin_layers

    names = plugin_layers(trt, network)
    ends = {"attention": "PagedAttention", "kv_write": "KVWrite"}
    return dict(Counter(ends.get(name.rpartition(".")[2], "SparseKVSend") for name in names))


def _register_plugins(trt: Any, library: str | None) -> Any:
    registry = trt.get_plugin_registry()
    if library is None:
        from pdtrim_tensorrt.python_forms import register

        return register(trt)
    if registry.load_library(library) is None:
        raise UserError(f"{library}: not a plugin library that TensorRT can load")
    return None


def _flags(trt: Any) -> int:
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return 0 if flag is None else 1 << int(flag)  # where it is gone, networks are always strongly typed


def _set_capabilities(trt: Any, config: Any, names: list[str]) -> None:
    if not names:
        return
    config.num_compute_capabilities = len(names)
    for index, name in enumerate(names):
        config.set_compute_capability(getattr(trt.ComputeCapability, name), index)


def _profile(builder: Any, network: Any, usual: int, most: int) -> Any:
    """Every input is a vector of as many tokens or rows as a call has; a call may send no rows."""
    profile = builder.create_optimization_profile()
    for index in range(network.num_inputs):
        name = network.get_input(index).name
        least = 0 if name.startswith("send_rows_") else 1
        profile.set_shape(name, (least,), (usual,), (most,))
    return profile


def _check_plan(plan: bytes, plugins: dict[str, int], job: dict[str, Any]) -> None:
    body = plan.replace(Path(job["plugin_library"]).read_bytes(), b"") if job["plugin_library"] else plan
    if job["plugin_library"] and len(body) == len(plan):
        raise UserError("the plugin library is not embedded in the plan file")
    if job["magic"] and not body.startswith(job["magic"].encode()):
        raise UserError(f"the plan file begins with {body[:4]!r}, not {job['magic']!r}: it is no engine")
    lost = [op for op in plugins if op.encode() not in body]
    if lost:
        raise UserError(f"the plan file does not name plugin {lost[0]}")


def _described(tensor: Any) -> str:
    return f"{tensor.name} {str(tensor.dtype).rsplit('.', 1)[-1].lower()} {list(tensor.shape)}"


def _first_error(parser: Any) -> str:
    if not parser.num_errors:
        return "no reason given"
    error = parser.get_error(0)
    return " ".join(f"op {error.node_operator()} of node {error.node_name()}: {error.desc()}".split())


def _logger(trt: Any) -> Any:
    class Logger(trt.ILogger):
        """Prints what matters, keeps the last error."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.worst = ""

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                self.worst = " ".join(message.split())
                print(self.worst, file=sys.stderr)

    return Logger()


def main() -> None:
    """Run the job that argv names."""
    job = json.loads(Path(sys.argv[1]).read_text())
    try:
        answer = build(job)
    except UserError as error:
        answer = {"error": str(error)}
    Path(job["answer"]).write_text(json.dumps(answer))


if __name__ == "__main__":
    main()
