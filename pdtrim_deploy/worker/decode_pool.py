"""How large the pools of a decode worker's cut layers are beside that of its whole layers. Pure: no torch."""

from __future__ import annotations

import re

from pydantic import PositiveInt

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.plan import ModelShape, PDPlan
from pdtrim_deploy.plan.blocks import Frozen
from pdtrim_deploy.plan.kv import KVSend

# What `pdtrim-deploy plan` reckons with, and how many requests SGLang's pool should hold at least.
ISL, OSL, FEWEST_REQUESTS = 4096, 256, 16


def request_bytes(model: ModelShape, layers: tuple[KVSend, ...], isl: int, osl: int) -> int:
    """Native KV of one request whose layer `j` holds the prompt rows that `layers[j]` keeps, and the answer.

    A layer with a window counts whole: SGLang has its slots among those of whole layers, or in a pool of its own.
    """
    row = model.packed_bytes("native", 1, first=False)
    return sum(row * ((send.rows(isl) if send.mode == "sparse" else isl) + osl) for send in layers)


class SplitPool(Frozen):
    """Requests of `isl` + `osl` tokens, for which whole and cut layers have pools that run out together.

    Layers that keep the same rows share a pool's slots, so that each layer holds what `request_bytes` says.
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

    @classmethod
    def of_pool(cls, tokens: int | None) -> SplitPool:
        """What a worker sizes for that was not told; `tokens` is its `--max-total-tokens`.

        The requests of `pdtrim-deploy plan`, or shorter ones with up to a quarter of answer where SGLang's pool would
        hold fewer than FEWEST_REQUESTS of those.
        """
        whole = ISL + OSL if tokens is None else min(ISL + OSL, max(2, tokens // FEWEST_REQUESTS))
        answer = min(OSL, max(1, whole // 4))
        return cls(isl=whole - answer, osl=answer)

    def slots(self, send: KVSend, tokens: int, page_size: int = 1) -> int:
        """Slots of a layer of rule `send`, in whole pages, where whole layers have `tokens`."""
        kept, whole = (-(-n // page_size) for n in (send.rows(self.isl) + self.osl, self.isl + self.osl))
        return -(-tokens * kept // (whole * page_size)) * page_size

    def token_bytes(self, plan: PDPlan, single: int) -> int:
        """What a token of the whole layers costs in all layers, rounded up, where one pool takes `single` bytes."""
        size = request_bytes(plan.model, plan.kv, self.isl, self.osl)
        return -(-single * size // request_bytes(plan.model, (KVSend(),) * len(plan.kv), self.isl, self.osl))
