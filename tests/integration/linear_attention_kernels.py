"""For workers of models with gated delta nets: torch forms of the kernels that SGLang 0.5.23 has for CPUs in an
unpublished package.

Imported in the worker's process before SGLang starts. Model, pools of states, backend and scheduler are SGLang's; the
kernels' arguments and layouts are those of its Triton forms (sglang/kernels/ops/mamba, ops/attention/fla and
ops/attention/linear), the rule is written down token by token (arXiv:2412.06464, equation 10).

Shapes: `channels` of query, key and value of all heads; `[heads, v, k]` a recurrent state; a request's state is the
pool's at its slot.
"""

from __future__ import annotations

import sys
from itertools import pairwise
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import conv1d, silu, softplus

EPS = 1e-6  # of the norm of queries and keys


def compute_by_torch() -> None:
    """From now on this process, and those that it forks, have the kernels."""
    missing: Any = ModuleType("sgl_kernel.mamba")
    missing.causal_conv1d_fn_cpu = convolve
    missing.causal_conv1d_update_cpu = convolve_next
    missing.chunk_gated_delta_rule_cpu = run
    sys.modules[missing.__name__] = missing
    operators = torch.ops.sgl_kernel
    operators.fused_gdn_gating_cpu = gates
    operators.fused_sigmoid_gating_delta_rule_update_cpu = run_next
    operators.fused_sigmoid_mul_cpu = let_through  # this and the next three are Qwen3.5's
    operators.fused_qk_gemma_rmsnorm_cpu = norm_both
    operators.fused_qk_gemma_rmsnorm_with_gate_cpu = norm_both_beside_gate
    operators.fused_qkvzba_split_reshape_cat_contiguous_cpu = split
    from sglang.kernels.ops.attention.fla import fused_norm_gate, layernorm_gated
    from sglang.srt.models import qwen2_moe

    fused_norm_gate.FusedRMSNormGated.forward = norm_and_gate
    layernorm_gated.RMSNorm.forward = norm_and_gate
    qwen2_moe.fused_gate_sigmoid_mul_add = add_gated
    of_device = torch.get_device_module
    # The model asks for the accelerator's current device, which a CUDA build of torch looks for without a GPU, too.
    torch.get_device_module = lambda device=None: of_device("cpu" if device is None else device)  # type: ignore


def norm_and_gate(self: Any, x: Tensor, z: Tensor) -> Tensor:
    """A module's forward, of activation silu (which is swish): `[rows, v]` both."""
    assert self.activation in ("silu", "swish"), self.activation
    return (_scaled(x, self.weight.float(), self.eps) * silu(z.float())).to(x.dtype)


def norm_both(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, eps: float, head_dim: int
) -> tuple[Tensor, Tensor]:
    """Gemma's norm of each head of `[tokens, heads * head_dim]`: `[tokens * heads, head_dim]` each."""
    sides = ((q, q_weight), (k, k_weight))
    first, second = (_scaled(x.reshape(-1, head_dim), 1 + weight.float(), eps).to(x.dtype) for x, weight in sides)
    return first, second


def norm_both_beside_gate(
    q_gate: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, eps: float, head_dim: int, heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The same where each head's gate stands behind its query."""
    q, gate = q_gate.view(-1, heads, 2, head_dim).unbind(2)
    return *norm_both(q, k, q_weight, k_weight, eps, head_dim), gate.contiguous()


def let_through(x: Tensor, gate: Tensor) -> None:
    """Attention's output, `[tokens, heads * head_dim]`, by how much each gate lets through."""
    x *= gate.reshape(x.shape).sigmoid()


def add_gated(hidden: Tensor, weight: Tensor, shared: Tensor, out: Tensor) -> None:
    """The shared expert's output, by how much its gate lets through: `[tokens, hidden]` all but `weight`."""
    out += (hidden.float() @ weight.float()).sigmoid()[:, None] * shared


def split(qkvz: Tensor, ba: Tensor, key_heads: int, heads: int, k: int, v: int) -> tuple[Tensor, ...]:
    """Of projections `[tokens, ..]`: channels, `z` `[tokens, heads, v]`, and `b` and `a` `[tokens, heads]`."""
    channels, z = qkvz.split([2 * key_heads * k + heads * v, heads * v], -1)
    b, a = ba.chunk(2, -1)
    return channels.contiguous(), z.unflatten(-1, (heads, v)).contiguous(), b.contiguous(), a.contiguous()


def convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, conv_states: Tensor, has_initial_state: Tensor,
    cache_indices: Tensor, query_start_loc: Tensor, seq_lens_cpu: Any = None,
) -> Tensor:  # fmt: skip
    """`x` `[channels, tokens]` of all requests: each goes on behind its pool's columns, and leaves its last there."""
    assert activation == "silu", activation
    out, columns = torch.empty_like(x), conv_states.shape[-1]
    spans = pairwise(query_start_loc.tolist())
    for slot, goes_on, (start, stop) in zip(cache_indices.tolist(), has_initial_state.tolist(), spans, strict=True):
        before = conv_states[slot] if goes_on else torch.zeros_like(conv_states[slot])
        seen = torch.cat((before.to(x.dtype), x[:, start:stop]), 1)
        out[:, start:stop] = silu(conv1d(seen[None], weight[:, None], bias, groups=len(weight)))[0]
        conv_states[slot] = seen[:, -columns:]
    return out


def convolve_next(
    x: Tensor, conv_states: Tensor, weight: Tensor, bias: Tensor | None, activation: str, conv_state_indices: Tensor
) -> Tensor:
    """The same of one token a request, `x` `[requests, channels]`."""
    starts = torch.arange(len(x) + 1)
    goes_on = torch.ones(len(x), dtype=torch.bool)
    return convolve(x.T, weight, bias, activation, conv_states, goes_on, conv_state_indices, starts).T.contiguous()


def gates(A_log: Tensor, a: Tensor, b: Tensor, dt_bias: Tensor) -> tuple[Tensor, Tensor]:
    """Of `a` and `b` `[tokens, heads]`: what of a state is kept, as a logarithm, and how much of a value is written."""
    kept = -A_log.float().exp() * softplus(a.float() + dt_bias.float())
    return kept[None], b.float().sigmoid()[None]


def run(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, initial_state: Tensor, initial_state_indices: Tensor,
    cu_seqlens: Tensor, head_first: bool = False, use_qk_l2norm_in_kernel: bool = True,
) -> tuple[Tensor, None, None]:  # fmt: skip
    """`q`, `k` `[1, tokens, key heads, k]`, `v` `[1, tokens, heads, v]`: the same shape as `v`; states become final."""
    assert use_qk_l2norm_in_kernel
    assert not head_first
    shared = v.shape[2] // k.shape[2]
    queries, keys = (_normed(side[0].float()).repeat_interleave(shared, 1) for side in (q, k))
    queries, values, out = queries * q.shape[-1] ** -0.5, v[0].float(), torch.empty_like(v[0])
    for slot, (start, stop) in zip(initial_state_indices.tolist(), pairwise(cu_seqlens.tolist()), strict=True):
        state = initial_state[slot].float()
        for token in range(start, stop):
            state = state * g[0, token].exp()[:, None, None]
            new = values[token] - _read(state, keys[token])
            state = state + (beta[0, token][:, None] * new)[:, :, None] * keys[token][:, None]
            out[token] = _read(state, queries[token])
        initial_state[slot] = state
    return out[None], None, None


def run_next(
    A_log: Tensor, dt_bias: Tensor, q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor,
    initial_state_source: Tensor, initial_state_indices: Tensor, cu_seqlens: Tensor,
    use_qk_l2norm_in_kernel: bool = True, softplus_beta: float = 1.0, softplus_threshold: float = 20.0,
) -> Tensor:  # fmt: skip
    """The same of one token a request."""
    assert (softplus_beta, softplus_threshold) == (1.0, 20.0)
    kept, written = gates(A_log, a, b, dt_bias)
    states = initial_state_source, initial_state_indices, cu_seqlens
    return run(q, k, v, kept, written, *states, use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel)[0]


def _scaled(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    return wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight


def _normed(rows: Tensor) -> Tensor:
    return rows * torch.rsqrt(rows.square().sum(-1, keepdim=True) + EPS)


def _read(state: Tensor, key: Tensor) -> Tensor:
    """`[heads, v, k]` at `[heads, k]`: `[heads, v]`."""
    return (state @ key[..., None])[..., 0]
