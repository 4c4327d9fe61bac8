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

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import torch
from onnx import ModelProto, NodeProto, helper

from pdtrim_builders.graph import ops
from pdtrim_builders.graph.rope import rope_table
from pdtrim_builders.graph.stage import SendRule, StageModel
from pdtrim_builders.graph.weights import ONNX_DTYPES, Weights, as_matmul, weight_bytes
from pdtrim_deploy import __version__
from pdtrim_deploy.errors import UserError

EXTERNAL_ABOVE = 2_000_000_000  # protobuf's limit is 2 GiB
INT64 = onnx.TensorProto.INT64
_ATTENTION, _MLP = ("self_attn", "input_layernorm"), ("mlp", "post_attention_layernorm")
_BEHIND_KV = ("mlp", "post_attention_layernorm", "q_proj", "q_norm", "o_proj")


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
    external = weight_bytes(stage.tensors, dtype) > external_above
    data = path.with_name(path.name + ".data") if external else None
    with Weights(stage.tensors, dtype, data) as weights:
        model = _Emitter(stage, weights, dtype, encode).model()
    left = sorted(name for name in stage.tensors if name not in weights.used and not _outside(name, stage))
    if left:
        raise UserError(f"{stage.path}: tensor {left[0]} has no place in the graph of {stage.architecture}")
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


class _Emitter:
    """Nodes in order; every method returns the name of its output."""

    def __init__(self, stage: StageModel, weights: Weights, dtype: str, encode: bool) -> None:
        self.stage, self.weights, self.dtype, self.encode = stage, weights, dtype, encode
        self.nodes: list[NodeProto] = []
        self.constants: set[str] = set()

    def model(self) -> ModelProto:
        s, real = self.stage, ONNX_DTYPES[self.dtype]
        self.shape_q = self.weights.add("shape_q", torch.tensor([0, s.heads, s.head_dim]))
        self.shape_kv = self.weights.add("shape_kv", torch.tensor([0, s.kv_heads, s.head_dim]))
        self.flat = self.weights.add("shape_flat", torch.tensor([0, -1]))
        self.zero = self.weights.add("axis_zero", torch.tensor([0]))
        self._angles()
        table = self.weights.add("embed_tokens", self.weights.read("model.embed_tokens.weight"))
        hidden = self.op("Gather", table, "input_ids", at="embed", axis=0)
        sends = {rule.prefill_layer: rule for rule in s.sends}
        for layer in range(s.layers):
            if (number := s.kv_layers.get(layer)) is not None:
                normed = self.norm(hidden, f"model.layers.{layer}.input_layernorm", f"l{layer}.norm1")
                q, k, v = self.qkv(layer, normed)
                if number in sends:
                    self.send(sends[number], k, v)
                if layer in s.kv_only:
                    hidden = self.kv_write(layer, hidden, k, v)
                    continue
                hidden = self.op("Add", hidden, self.attention(layer, q, k, v), at=f"l{layer}.residual1")
            if layer not in s.without_mlp:
                hidden = self.op("Add", hidden, self.mlp(layer, hidden), at=f"l{layer}.residual2")
        self.norm(hidden, "model.norm", "hidden_states")
        value = helper.make_tensor_value_info
        inputs = [value("input_ids", INT64, ["T"]), value("positions", INT64, ["T"])]
        inputs += [
            value(name, INT64, [name.replace("send_", "")]) for name in dict.fromkeys(r.rows_input for r in s.sends)
        ]
        results = [value("hidden_states", real, ["T", s.hidden])]
        for rule in s.sends:
            if self.wire(rule) == "native":
                row = rule.rows_input.replace("send_", "")
                results.append(value(rule.output, real, [2, row, s.kv_heads * s.head_dim]))
            else:
                results.append(value(rule.output, onnx.TensorProto.INT8, [f"{rule.output}_bytes"]))
        plain = all(self.wire(rule) == "native" for rule in s.sends)
        graph = helper.make_graph(self.nodes, f"pdtrim_{s.stage}", inputs, results, self.weights.initializers)
        model = helper.make_model(
            graph,
            functions=ops.functions(op for op in s.custom_nodes if plain or op != ops.SPARSE_KV_SEND),
            opset_imports=ops.opset_imports(),
            ir_version=ops.IR_VERSION,
            producer_name="pdtrim-deploy",
            producer_version=__version__,
        )
        facts = {"stage": s.stage, "plan_digest": s.plan.digest, "architecture": s.architecture, "dtype": self.dtype}
        helper.set_model_props(model, {f"pdtrim.{key}": value for key, value in facts.items()})
        return model

    def constant(self, name: str, values: list[int]) -> str:
        """An initialiser that several nodes may read."""
        if name not in self.constants:
            self.constants.add(self.weights.add(name, torch.tensor(values)))
        return name

    def op(self, kind: str, *inputs: str, at: str, outputs: int = 1, **attributes: Any) -> str:
        names = [at] if outputs == 1 else [f"{at}.{number}" for number in range(outputs)]
        self.nodes.append(helper.make_node(kind, list(inputs), names, name=at, **attributes))
        return names[0]

    def norm(self, value: str, tensor: str, at: str) -> str:
        scale = self.weights.add(f"{tensor}.weight", self.weights.read(f"{tensor}.weight"))
        return self.op("RMSNormalization", value, scale, at=at, axis=-1, epsilon=self.stage.norm_epsilon)

    def linear(self, value: str, names: list[str], at: str) -> str:
        """One MatMul for linear layers that read the same input, with their biases where they have any."""
        w = self.weights
        out = self.op("MatMul", value, w.add(f"{at}.weight", as_matmul(*(w.read(f"{n}.weight") for n in names))), at=at)
        biased = [n for n in names if w.has(f"{n}.bias")]
        if not biased:
            return out
        if biased != names:
            raise UserError(
                f"{self.stage.path}: {biased[0]} has a bias but its neighbours have none; the graph needs all or none"
            )
        bias = w.add(f"{at}.bias", torch.cat([w.read(f"{n}.bias") for n in names]))
        return self.op("Add", out, bias, at=f"{at}.biased")

    def qkv(self, layer: int, normed: str) -> tuple[str, str, str]:
        """Q, K and V after RoPE; no Q ("") in a KV-only layer."""
        s, at, where = self.stage, f"l{layer}", f"model.layers.{layer}.self_attn"
        sides = "kv" if layer in s.kv_only else "qkv"
        heads = {"q": s.heads, "k": s.kv_heads, "v": s.kv_heads}
        joint = self.linear(normed, [f"{where}.{x}_proj" for x in sides], f"{at}.{sides}")
        split = self.constant(f"split_{sides}", [heads[x] * s.head_dim for x in sides])
        self.op("Split", joint, split, at=f"{at}.split", outputs=len(sides), axis=-1)
        values = {side: f"{at}.split.{number}" for number, side in enumerate(sides)}
        for side in sides[:-1]:
            values[side] = self.rotate(self.head_norm(values[side], layer, side), f"{at}.{side}", heads[side])
        return values.get("q", ""), values["k"], values["v"]

    def head_norm(self, value: str, layer: int, side: str) -> str:
        """Qwen3: RMSNorm within each head."""
        tensor = f"model.layers.{layer}.self_attn.{side}_norm"
        if not self.weights.has(f"{tensor}.weight"):
            return value
        at = f"l{layer}.{side}"
        heads = self.op("Reshape", value, self.shape_q if side == "q" else self.shape_kv, at=f"{at}_heads")
        return self.op("Reshape", self.norm(heads, tensor, f"{at}_norm"), self.flat, at=f"{at}_normed")

    @property
    def rope_dtype(self) -> str:
        """Of the rotation: bfloat16's 8 bits are too few for cosines, so there it is float32, as in SGLang."""
        return "float32" if self.dtype == "bfloat16" else self.dtype

    def _angles(self) -> None:
        table = rope_table(self.stage.rope, self.stage.head_dim, self.stage.positions)
        half = self.stage.head_dim // 2
        for name, part in (("cos", table[:, :half]), ("sin", table[:, half:])):
            values = self.weights.add(f"rope_{name}", part, self.rope_dtype)
            rows = self.op("Gather", values, "positions", at=f"{name}_rows", axis=0)
            self.op("Unsqueeze", rows, self.zero, at=name)

    def rotate(self, value: str, at: str, heads: int) -> str:
        wide = self.cast(value, self.dtype, self.rope_dtype, f"{at}_wide")
        batch = self.op("Unsqueeze", wide, self.zero, at=f"{at}_batch")
        turned = self.op("RotaryEmbedding", batch, "cos", "sin", at=f"{at}_turned", num_heads=heads)
        flat = self.op("Squeeze", turned, self.zero, at=f"{at}_rope")
        return self.cast(flat, self.rope_dtype, self.dtype, f"{at}_narrow")

    def cast(self, value: str, source: str, target: str, at: str) -> str:
        return value if source == target else self.op("Cast", value, at=at, to=ONNX_DTYPES[target])

    def attention(self, layer: int, q: str, k: str, v: str) -> str:
        s = self.stage
        attended = self.op(
            ops.PAGED_ATTENTION,
            q,
            k,
            v,
            at=f"l{layer}.attention",
            domain=ops.DOMAIN,
            layer_id=s.kv_layers[layer],
            num_heads=s.heads,
            num_kv_heads=s.kv_heads,
            head_dim=s.head_dim,
            scale=s.head_dim**-0.5,
            **ops.PLUGIN,
        )
        return self.linear(attended, [f"model.layers.{layer}.self_attn.o_proj"], f"l{layer}.o")

    def kv_write(self, layer: int, hidden: str, k: str, v: str) -> str:
        s = self.stage
        attributes = {"layer_id": s.kv_layers[layer], "num_kv_heads": s.kv_heads, "head_dim": s.head_dim, **ops.PLUGIN}
        return self.op(ops.KV_WRITE, hidden, k, v, at=f"l{layer}.kv_write", domain=ops.DOMAIN, **attributes)

    def mlp(self, layer: int, hidden: str) -> str:
        s, at, where = self.stage, f"l{layer}", f"model.layers.{layer}.mlp"
        normed = self.norm(hidden, f"model.layers.{layer}.post_attention_layernorm", f"{at}.norm2")
        joint = self.linear(normed, [f"{where}.gate_proj", f"{where}.up_proj"], f"{at}.gate_up")
        split = self.constant("split_mlp", [s.intermediate] * 2)
        gate = self.op("Split", joint, split, at=f"{at}.gate", outputs=2, axis=-1)
        open_ = self.op("Mul", gate, self.op("Sigmoid", gate, at=f"{at}.sigmoid"), at=f"{at}.silu")
        gated = self.op("Mul", open_, f"{at}.gate.1", at=f"{at}.gated")
        return self.linear(gated, [f"{where}.down_proj"], f"{at}.down")

    def wire(self, rule: SendRule) -> str:
        """The wire dtype of a layer's rows; native for layers with key offsets, which no engine has."""
        plain = not self.encode or self.stage.plan.has_key_offset(rule.decode_layer)
        return "native" if plain else rule.send.wire_dtype

    def send(self, rule: SendRule, k: str, v: str) -> str:
        s = self.stage
        return self.op(
            ops.SPARSE_KV_SEND,
            k,
            v,
            rule.rows_input,
            at=rule.output,
            domain=ops.DOMAIN,
            layer_id=rule.decode_layer,
            wire_dtype=self.wire(rule),
            num_kv_heads=s.kv_heads,
            head_dim=s.head_dim,
            **ops.PLUGIN,
        )
