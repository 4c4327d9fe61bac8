"""A bfloat16 graph as one that computes in float32: onnxruntime's CPU kernels lack bfloat16 (MatMul, for one)."""

from __future__ import annotations

from pathlib import Path

import onnx
from onnx import TensorProto, helper

BFLOAT16, FLOAT = TensorProto.BFLOAT16, TensorProto.FLOAT


def widened(graph: Path) -> Path:
    """Write the graph beside `graph`, with its very weights, each cast to float32 where it is used; returns its path.

    float32 holds every bfloat16 value, so the nodes and weights are what is checked, and no rounding of activations.
    """
    model = onnx.load(graph, load_external_data=False)
    casts = []
    for weight in model.graph.initializer:
        if weight.data_type == BFLOAT16:
            wide, weight.name = weight.name, f"{weight.name}.bfloat16"
            casts.append(helper.make_node("Cast", [weight.name], [wide], name=f"{wide}.wide", to=FLOAT))
    for node in model.graph.node:
        if node.op_type == "Cast":
            target = next(attribute for attribute in node.attribute if attribute.name == "to")
            target.i = FLOAT if target.i == BFLOAT16 else target.i
    for output in model.graph.output:
        kind = output.type.tensor_type
        kind.elem_type = FLOAT if kind.elem_type == BFLOAT16 else kind.elem_type
    nodes = [*casts, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    path = graph.with_name(f"{graph.stem}.float32{graph.suffix}")
    path.write_bytes(model.SerializeToString(deterministic=True))
    return path
