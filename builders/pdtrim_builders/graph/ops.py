"""The three ops of domain `pdtrim`: schemas for onnx's checker, function bodies for runtimes without a kernel.

    PagedAttention(q [T, heads * head_dim], k, v [T, kv_heads * head_dim]) -> [T, heads * head_dim]
        The runtime's attention: q, k after RoPE; the runtime appends k, v to its pool and attends to the pool. The
        body has the same meaning without a pool: causal attention among the T tokens of one prompt. A runtime that
        registers a kernel for the op never uses the body (onnxruntime 1.32: a kernel takes precedence).
    KVWrite(hidden [T, width], k, v [T, kv_heads * head_dim]) -> hidden
        A KV-only layer: the runtime appends k, v to its pool and returns the first input. The body only returns it.
    SparseKVSend(k, v [T, kv_heads * head_dim], rows int64 [R]) -> [2, R, kv_heads * head_dim]
        Rows of K, then of V, as they travel; `layer_id` is the layer of *decode* that reads them. With another
        `wire_dtype` than "native" the output is the codec's bytes, int8 [B], and the op has no body.

TensorRT's parser looks for a plugin only where a node carries `plugin_namespace`; without one it inlines the body.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import onnx
from onnx import AttributeProto, FunctionProto, NodeProto, defs, helper

DOMAIN, DOMAIN_VERSION, OPSET, IR_VERSION = "pdtrim", 1, 23, 11
PAGED_ATTENTION, KV_WRITE, SPARSE_KV_SEND = "PagedAttention", "KVWrite", "SparseKVSend"
OPS = (PAGED_ATTENTION, KV_WRITE, SPARSE_KV_SEND)
PLUGIN: dict[str, Any] = {"plugin_namespace": DOMAIN, "plugin_version": "1"}
_FLOATS = ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"]
_INT, _FLOAT, _STRING = AttributeProto.INT, AttributeProto.FLOAT, AttributeProto.STRING
_PLUGIN_TYPES = {"plugin_namespace": _STRING, "plugin_version": _STRING}
ATTRIBUTES: dict[str, dict[str, AttributeProto.AttributeType]] = {
    PAGED_ATTENTION: {"layer_id": _INT, "num_heads": _INT, "num_kv_heads": _INT, "head_dim": _INT, "scale": _FLOAT}
    | _PLUGIN_TYPES,
    KV_WRITE: {"layer_id": _INT, "num_kv_heads": _INT, "head_dim": _INT} | _PLUGIN_TYPES,
    SPARSE_KV_SEND: {"layer_id": _INT, "wire_dtype": _STRING, "num_kv_heads": _INT, "head_dim": _INT} | _PLUGIN_TYPES,
}
_INPUTS = {
    PAGED_ATTENTION: {"q": "T", "k": "T", "v": "T"},
    KV_WRITE: {"hidden": "T", "k": "T", "v": "T"},
    SPARSE_KV_SEND: {"k": "T", "v": "T", "rows": "tensor(int64)"},
}
_OUTPUT = {PAGED_ATTENTION: "output", KV_WRITE: "output", SPARSE_KV_SEND: "packed"}


def functions(ops: Iterable[str]) -> list[FunctionProto]:
    """Bodies of those ops."""
    bodies = {PAGED_ATTENTION: _attention_body, KV_WRITE: _write_body, SPARSE_KV_SEND: _send_body}
    return [_function(op, bodies[op]()) for op in ops]


def opset_imports() -> list[onnx.OperatorSetIdProto]:
    """The opsets that a stage graph uses."""
    return [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, DOMAIN_VERSION)]


def register_schemas() -> None:
    """Register the ops with onnx's checker in this process."""
    for op in OPS:
        if defs.has(op, DOMAIN):
            continue
        schema = defs.OpSchema(
            op,
            DOMAIN,
            DOMAIN_VERSION,
            inputs=[defs.OpSchema.FormalParameter(name, kind) for name, kind in _INPUTS[op].items()],
            outputs=[defs.OpSchema.FormalParameter(_OUTPUT[op], "Packed" if op == SPARSE_KV_SEND else "T")],
            type_constraints=[("T", _FLOATS, "activations")]
            + ([("Packed", [*_FLOATS, "tensor(int8)"], "rows or bytes")] if op == SPARSE_KV_SEND else []),
            attributes=[
                defs.OpSchema.Attribute(name, getattr(defs.OpSchema.AttrType, AttributeProto.AttributeType.Name(kind)))
                for name, kind in ATTRIBUTES[op].items()
            ],
        )
        defs.register_schema(schema)


def _function(op: str, body: list[NodeProto]) -> FunctionProto:
    return helper.make_function(
        DOMAIN, op, list(_INPUTS[op]), [_OUTPUT[op]], body, [helper.make_opsetid("", OPSET)], list(ATTRIBUTES[op])
    )


def _attention_body() -> list[NodeProto]:
    attention = helper.make_node("Attention", ["q1", "k1", "v1"], ["o1"], is_causal=1)
    refs = {"q_num_heads": ("num_heads", _INT), "kv_num_heads": ("num_kv_heads", _INT), "scale": ("scale", _FLOAT)}
    for name, (ref, kind) in refs.items():
        attention.attribute.append(AttributeProto(name=name, type=kind, ref_attr_name=ref))
    return [
        helper.make_node("Constant", [], ["zero"], value_ints=[0]),
        *(helper.make_node("Unsqueeze", [name, "zero"], [f"{name}1"]) for name in "qkv"),
        attention,
        helper.make_node("Squeeze", ["o1", "zero"], ["output"]),
    ]


def _write_body() -> list[NodeProto]:
    return [helper.make_node("Identity", ["hidden"], ["output"])]


def _send_body() -> list[NodeProto]:
    return [
        helper.make_node("Constant", [], ["zero"], value_ints=[0]),
        *(helper.make_node("Gather", [name, "rows"], [f"{name}_rows"], axis=0) for name in "kv"),
        *(helper.make_node("Unsqueeze", [f"{name}_rows", "zero"], [f"{name}_side"]) for name in "kv"),
        helper.make_node("Concat", ["k_side", "v_side"], ["packed"], axis=0),
    ]
