"""Nodes of a stage's graph: what a block computes, from the weights of its checkpoint."""

from __future__ import annotations

from typing import Any

import torch
from onnx import NodeProto, helper

from pdtrim_builders.graph import ops
from pdtrim_builders.graph.rope import rope_table
from pdtrim_builders.graph.stage import SendRule, StageModel
from pdtrim_builders.graph.weights import ONNX_DTYPES, Weights, as_matmul
from pdtrim_deploy.errors import UserError


class Nodes:
    """In their order; every method returns the name of its output."""

    def __init__(self, stage: StageModel, weights: Weights, dtype: str, encode: bool) -> None:
        self.stage, self.weights, self.dtype, self.encode = stage, weights, dtype, encode
        self.nodes: list[NodeProto] = []
        self.constants: set[str] = set()
        self.shape_q = weights.add("shape_q", torch.tensor([0, stage.heads, stage.head_dim]))
        self.shape_kv = weights.add("shape_kv", torch.tensor([0, stage.kv_heads, stage.head_dim]))
        self.flat = weights.add("shape_flat", torch.tensor([0, -1]))
        self.zero = weights.add("axis_zero", torch.tensor([0]))
        self._angles()

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
