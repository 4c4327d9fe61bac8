"""SGLang's bootstrap server, which takes what anybody sends: here a rank registers once, and with sense.

SGLang 0.5.23 (disaggregation/common/conn.py) lets any later PUT /route replace a rank's address, after which every new
decode worker talks to nobody. A prefill worker's ranks live as long as its bootstrap server: none registers twice.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from typing import Annotated

from aiohttp import web
from pydantic import BaseModel, Field, IPvAnyAddress, ValidationError
from sglang.srt.disaggregation.common.conn import CommonKVBootstrapServer

Rank = Annotated[int, Field(ge=0, lt=1 << 16, strict=True)]
Size = Annotated[int, Field(ge=1, lt=1 << 16, strict=True)]


class Registration(BaseModel):
    """What of a PUT /route must be right for it to be believed."""

    attn_tp_size: Size
    attn_tp_rank: Rank
    attn_cp_size: Size
    attn_cp_rank: Rank
    attn_dp_size: Size
    attn_dp_rank: Rank
    pp_size: Size
    pp_rank: Rank
    system_dp_size: Size
    system_dp_rank: Rank
    rank_ip: IPvAnyAddress
    rank_port: Annotated[int, Field(ge=1, le=65535)]
    page_size: Size


class PDTrimBootstrapServer(CommonKVBootstrapServer):
    """Answers 400 to what is malformed, 409 to who would replace a rank."""

    async def _handle_route_put(self, request: web.Request) -> web.Response:
        try:
            asked = Registration.model_validate(await request.json())
        except (ValidationError, json.JSONDecodeError, UnicodeDecodeError):
            return web.Response(text="not a registration of a prefill rank", status=400)
        group = asked.attn_dp_rank if asked.system_dp_size == 1 else asked.system_dp_rank
        ranks = self.prefill_port_table.get(group, {}).get(asked.attn_cp_rank, {}).get(asked.attn_tp_rank, {})
        if asked.pp_rank in ranks:
            return web.Response(text="this rank is registered already", status=409)
        return await super()._handle_route_put(request)

    async def _handle_route_get(self, request: web.Request) -> web.Response:
        try:
            return await super()._handle_route_get(request)
        except ValueError:
            return web.Response(text="ranks are numbers", status=400)

    async def _handle_register_dp_rank(self, request: web.Request) -> web.Response:
        return await _sensible(super()._handle_register_dp_rank, request)

    async def _handle_query_dp_ranks(self, request: web.Request) -> web.Response:
        return await _sensible(super()._handle_query_dp_ranks, request)


async def _sensible(handle: Callable[[web.Request], Awaitable[web.Response]], request: web.Request) -> web.Response:
    try:
        return await handle(request)
    except (ValueError, KeyError, TypeError):
        return web.Response(text="malformed", status=400)
