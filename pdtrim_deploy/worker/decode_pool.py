"""How a decode worker holds KV: all layers in one pool, or sparse layers in pools of their own. Pure: no torch."""

from __future__ import annotations

import re

from pydantic import PositiveInt

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.plan import ModelShape, PDPlan
from pdtrim_deploy.plan.blocks import Frozen
from pdtrim_deploy.plan.kv import KVSend
from pdtrim_deploy.plan.wire import packed_row_bytes


def request_bytes(model: ModelShape, layers: tuple[KVSend, ...], isl: int, osl: int) -> int:
    """Native KV of one request whose layer `j` holds the prompt rows that `layers[j]` sends, and the answer."""
    row = packed_row_bytes("native", model.kv_dtype, model.num_kv_heads, model.head_dim)
    return sum(2 * row * (send.rows(isl) + osl) for send in layers)


class SplitPool(Frozen):
    """Sparse layers hold kept prompt tokens and answers only, in pools sized for requests of `isl` + `osl` tokens.

    Layers with equal first and last share a pool's slots, so that each layer holds what `request_bytes` says.
    Requests of other lengths are served as well: a pool that is short makes them wait, as a full one always did.
    """

    isl: PositiveInt
    osl: PositiveInt

    @classmethod
    def parse(cls, text: str) -> SplitPool:
        """`4096:256`; UserError for anything else."""
        match = re.fullmatch(r"([1-9]\d{0,8}):([1-9]\d{0,8})", text.strip())
        if match is None:
            raise UserError(
                f"--split-decode-pool {text!r}: give prompt and answer tokens of the requests to size it for, ISL:OSL, "
                f"such as 4096:256"
            )
        return cls(isl=int(match[1]), osl=int(match[2]))

    def slots(self, send: KVSend, tokens: int) -> int:
        """Slots of a layer of rule `send` where full layers have `tokens`."""
        return -(-tokens * (send.rows(self.isl) + self.osl) // (self.isl + self.osl))

    def token_bytes(self, plan: PDPlan, single: int) -> int:
        """What a token of the full layers costs in all layers, rounded up, where one pool takes `single` bytes."""
        size = request_bytes(plan.model, plan.kv, self.isl, self.osl)
        return -(-single * size // request_bytes(plan.model, (KVSend(),) * len(plan.kv), self.isl, self.osl))
