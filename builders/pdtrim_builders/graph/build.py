"""One stage as one ONNX graph, made node by node from the weights: small, deterministic, nothing traced.

    input_ids int64 [T], positions int64 [T] (, send_rows_* int64 [R] for prefill)
        -> hidden_states [T, hidden] after the final norm (, kv_send_{decode layer} [2, R, kv_heads * head_dim])

T is the number of tokens of the batch, requests one after the other, as SGLang passes them. `positions` are absolute.
Sublayers that the plan leaves out are not in the graph, nor are their weights, norms among them; `layer_id` of
attention nodes counts KV layers. There is one `send_rows_*` input for each distinct rule of the plan: `send_rows_full`,
`send_rows_{n_first}_{n_last}` or `..._{share}`; it lists rows of this call's T tokens (`chunk_layout(...).layers[i]`'s
`ranges`, plus the request's first row in a batch). The outputs, in their order, are the bytes of `kvcache.pack`. Layers
with a quantised wire dtype leave the graph as plain rows (`wire_dtype` "native") for the executor to encode, or, with
`encode`, as the codec's bytes, int8 [B]: only a plugin can do that, the op's body cannot. The LM head is not in the
graph: SGLang computes it.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import onnx
from onnx import ModelProto, helper

from pdtrim_builders.graph import ops
from pdtrim_builders.graph.nodes import Nodes
from pdtrim_builders.graph.stage import StageModel
from pdtrim_builders.graph.weights import ONNX_DTYPES, Weights, weight_bytes
from pdtrim_deploy import __version__
from pdtrim_deploy.errors import UserError

EXTERNAL_ABOVE = 2_000_000_000  # protobuf's limit is 2 GiB
INT64 = onnx.TensorProto.INT64
_ATTENTION, _MLP = ("self_attn", "input_layernorm"), ("mlp", "post_attention_layernorm")
_BEHIND_KV = ("mlp", "post_attention_layernorm", "q_proj", "q_norm", "o_proj")
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class GraphFile:
    """A graph on disk; `files` are the graph and, when there is one, the file of its weights."""

    path: Path
    files: tuple[Path, ...]
    dtype: str
    op_counts: dict[str, int]

    @property
    def custom_nodes(self) -> int:
        """Nodes of domain `pdtrim`, which TensorRT must show as PLUGIN layers."""
        return sum(self.op_counts[op] for op in ops.OPS)


def build_graph(
    stage: StageModel, path: Path, dtype: str, *, encode: bool = False, external_above: int = EXTERNAL_ABOVE
) -> GraphFile:
    """Write the graph of `stage` to `path` (and `{path}.data`, when its weights pass `external_above` bytes).

    Raises UserError: a dtype or a tensor that the graph does not support.
    """
    if dtype not in ONNX_DTYPES:
        raise UserError(f"dtype {dtype!r} has no graph; use one of {', '.join(ONNX_DTYPES)}")
    tables = 4 * stage.positions * stage.head_dim  # RoPE's, in float32 at most: half a gigabyte of a million positions
    external = weight_bytes(stage.tensors, dtype) + tables > external_above
    data = path.with_name(path.name + ".data") if external else None
    with Weights(stage.tensors, dtype, data) as weights:
        model = _model(stage, weights, dtype, encode)
    left = sorted(name for name in stage.tensors if name not in weights.used and not _outside(name, stage))
    if left:
        raise UserError(f"{stage.path}: tensor {left[0]} has no place in the graph of {stage.architecture}")
    logger.info("writing and checking the graph")
    path.write_bytes(model.SerializeToString(deterministic=True))
    ops.register_schemas()
    onnx.checker.check_model(str(path))
    counts: dict[str, int] = dict.fromkeys(ops.OPS, 0)
    for node in model.graph.node:
        counts[node.op_type] = counts.get(node.op_type, 0) + 1
    return GraphFile(path, (path, *((data,) if data else ())), dtype, counts)


def _outside(name: str, stage: StageModel) -> bool:
    """Whether the graph omits that tensor: everything after K and V in a KV-only layer, and what a layer goes without.

    A sublayer's input norm goes with it.
    """
    rest = name.partition("model.layers.")[2].split(".")
    unused = False
    if len(rest) > 2:
        layer = int(rest[0])
        unused = layer in stage.kv_only and (rest[1] in _BEHIND_KV or rest[2] in _BEHIND_KV)
        unused |= layer not in stage.kv_layers and rest[1] in _ATTENTION
        unused |= layer in stage.without_mlp and rest[1] in _MLP
    return name == "lm_head.weight" or name.endswith("rotary_emb.inv_freq") or unused


def _model(s: StageModel, weights: Weights, dtype: str, encode: bool) -> ModelProto:
    """`s` from token ids to hidden states."""
    real, nodes = ONNX_DTYPES[dtype], Nodes(s, weights, dtype, encode)
    table = weights.add("embed_tokens", weights.read("model.embed_tokens.weight"))
    hidden = nodes.op("Gather", table, "input_ids", at="embed", axis=0)
    sends = {rule.prefill_layer: rule for rule in s.sends}
    for layer in range(s.layers):
        logger.info("graph: %d/%d layers", layer, s.layers)
        if (number := s.kv_layers.get(layer)) is not None:
            normed = nodes.norm(hidden, f"model.layers.{layer}.input_layernorm", f"l{layer}.norm1")
            q, k, v = nodes.qkv(layer, normed)
            if number in sends:
                nodes.send(sends[number], k, v)
            if layer in s.kv_only:
                hidden = nodes.kv_write(layer, hidden, k, v)
                continue
            hidden = nodes.op("Add", hidden, nodes.attention(layer, q, k, v), at=f"l{layer}.residual1")
        if layer not in s.without_mlp:
            hidden = nodes.op("Add", hidden, nodes.mlp(layer, hidden), at=f"l{layer}.residual2")
    nodes.norm(hidden, "model.norm", "hidden_states")
    value = helper.make_tensor_value_info
    inputs = [value("input_ids", INT64, ["T"]), value("positions", INT64, ["T"])]
    inputs += [value(name, INT64, [name.replace("send_", "")]) for name in dict.fromkeys(r.rows_input for r in s.sends)]
    results = [value("hidden_states", real, ["T", s.hidden])]
    for rule in s.sends:
        if nodes.wire(rule) == "native":
            row = rule.rows_input.replace("send_", "")
            results.append(value(rule.output, real, [2, row, s.kv_heads * s.head_dim]))
        else:
            results.append(value(rule.output, onnx.TensorProto.INT8, [f"{rule.output}_bytes"]))
    plain = all(nodes.wire(rule) == "native" for rule in s.sends)
    graph = helper.make_graph(nodes.nodes, f"pdtrim_{s.stage}", inputs, results, weights.initializers)
    model = helper.make_model(
        graph,
        functions=ops.functions(op for op in s.custom_nodes if plain or op != ops.SPARSE_KV_SEND),
        opset_imports=ops.opset_imports(),
        ir_version=ops.IR_VERSION,
        producer_name="pdtrim-deploy",
        producer_version=__version__,
    )
    facts = {"stage": s.stage, "plan_digest": s.plan.digest, "architecture": s.architecture, "dtype": dtype}
    helper.set_model_props(model, {f"pdtrim.{key}": value for key, value in facts.items()})
    return model
