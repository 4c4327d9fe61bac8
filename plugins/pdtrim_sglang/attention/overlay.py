"""An SGLang object as a group of cut layers shall see it: the same, but for what is the group's own."""

from __future__ import annotations

import copy
from typing import Any

from pdtrim_sglang.kept_pool.group import KeptGroup


class Overlay:
    """`base`, with some attributes replaced; what is set on it stays on it."""

    def __init__(self, base: Any, **replaced: Any) -> None:
        self._base = base
        vars(self).update(replaced)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._base, name)


def group_runner(runner: Any, group: KeptGroup) -> Overlay:
    """SGLang's ModelRunner for a backend of the layers of `group`: its table in the place of `req_to_token`.

    The KV pool is the runner's: it finds a layer's buffers by the layer, and slots are those of the layer's group.
    """
    table, longest = group.table, group.table.shape[1]
    requests, model = runner.req_to_token_pool, runner.model_config
    translator = copy.copy(runner.kv_index_translator)  # the identity here, but it holds `req_to_token`
    translator.req_to_token = table
    return Overlay(
        runner,
        req_to_token_pool=Overlay(requests, req_to_token=table, max_context_len=longest),
        model_config=Overlay(model, context_len=min(model.context_len, longest)),
        kv_index_translator=translator,
    )
