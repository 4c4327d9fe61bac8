"""Run by test_rtx.py, a process a build: a graph of one plugin node -> TensorRT for RTX -> what came out, as JSON."""

import json
import sys
from pathlib import Path

import tensorrt_rtx as trt
from onnx import TensorProto, helper
from pdtrim_tensorrt import python_forms
from pdtrim_tensorrt.kernel import KERNEL_WIRE_DTYPES

T = TensorProto
ATTRIBUTES = {
    "PagedAttention": {"layer_id": 3, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "scale": 0.35},
    "KVWrite": {"layer_id": 3, "num_kv_heads": 2, "head_dim": 8},
    "SparseKVSend": {"layer_id": 3, "num_kv_heads": 2, "head_dim": 8},
}
PROFILE = {"q": 32, "hidden": 24, "k": 16, "v": 16}


def graph(op, dtype, wire, omit):
    attributes = dict(ATTRIBUTES[op], plugin_namespace="pdtrim", plugin_version="1")
    if wire:
        attributes["wire_dtype"] = wire
    for name in omit:
        del attributes[name]
    kind, value = getattr(T, dtype), helper.make_tensor_value_info
    if op != "SparseKVSend":
        first = "q" if op == "PagedAttention" else "hidden"
        names, output = [first, "k", "v"], value("output", kind, ["T", PROFILE[first]])
    else:
        native = value("output", kind, [2, "R", 16])
        names, output = ["k", "v", "rows"], native if wire == "native" else value("output", T.INT8, ["B"])
    inputs = [value(n, T.INT64, ["R"]) if n == "rows" else value(n, kind, ["T", PROFILE[n]]) for n in names]
    node = helper.make_node(op, names, ["output"], name="node", domain="pdtrim", **attributes)
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("pdtrim", 1)]
    return helper.make_model(helper.make_graph([node], "g", inputs, [output]), opset_imports=opsets, ir_version=11)


def embedded(plan, library):
    """Whether the plan holds the library's file, and the plan without it."""
    code = Path(library).read_bytes() if library else b""
    return bool(code) and code in plan, plan.replace(code, b"") if code else plan


def build(op, dtype, wire=None, library=None, omit=()):
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    if library:
        trt.get_plugin_registry().load_library(library)
    else:
        creators = python_forms.register(trt)  # noqa: F841 (the registry does not keep them)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    parsed = parser.parse(graph(op, dtype, wire, omit).SerializeToString())
    if not parsed:
        return {"parsed": False, "error": parser.get_error(0).desc()}
    config, profile = builder.create_builder_config(), builder.create_optimization_profile()
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM80, 0)
    if library:
        config.plugins_to_serialize = [library]
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        tail = tuple(tensor.shape)[1:]
        profile.set_shape(tensor.name, (1, *tail), (16, *tail), (64, *tail))
    config.add_optimization_profile(profile)
    output = network.get_output(0)
    engine = builder.build_serialized_network(network, config)
    held, plan = embedded(bytes(engine) if engine else b"", library)
    return {
        "parsed": True,
        "layers": network.num_layers,
        "plugin_layers": python_forms.plugin_layers(trt, network),
        "output": [list(output.shape), str(output.dtype).removeprefix("DataType.")],
        "magic": plan[:4].decode(errors="replace"),
        "in_plan": [op for op in ATTRIBUTES if op.encode() in plan],
        "wire_in_plan": [
            wire for wire in KERNEL_WIRE_DTYPES if wire.encode() in plan.rpartition(b"wire_dtype")[2][:32]
        ],
        "embedded": held,
    }


if __name__ == "__main__":
    print(json.dumps(build(**json.loads(sys.argv[1]))))
