"""SGLang's bootstrap server, which takes what anybody sends: here it hears members, and a rank registers once.

SGLang 0.5.23 (disaggregation/common/conn.py) lets any later PUT /route replace a rank's address, after which every new
decode worker talks to nobody. A prefill worker's ranks live as long as its bootstrap server: none registers twice.
"""

from __future__ import annotations

from typing import Annotated, Any

from aiohttp import web
from aiohttp.typedefs import Handler
from pydantic import BaseModel, Field, IPvAnyAddress, model_validator
from sglang.srt.disaggregation.common.conn import CommonKVBootstrapServer

from pdtrim_sglang import identity, sglang_host
from pdtrim_sglang.signature import HEADER

MOST_BODY_BYTES = 256 << 10  # a query of some ten thousand rooms; aiohttp answers 413 to more
MALFORMED = (ValueError, LookupError, TypeError, OverflowError, RecursionError)  # what parsing such a body raises
ANOTHER_RANK = "this rank is registered already, and not with these values"
KINDS = ("attn_tp", "attn_cp", "attn_dp", "pp", "system_dp")
Rank = Annotated[int, Field(ge=0, lt=1 << 16, strict=True)]
Size = Annotated[int, Field(ge=1, lt=1 << 16, strict=True)]
Port = Annotated[int, Field(ge=1, le=65535)]


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
    rank_port: Port
    page_size: Size
    kv_cache_dtype: Annotated[str, Field(max_length=64)] | None
    prefill_http_port: Port | None = None

    @model_validator(mode="after")
    def _ranks_lie_below_sizes(self) -> Registration:
        """With DP attention the system's size is 1, and SGLang gives attention's rank as the system's too."""
        kinds = [kind for kind in KINDS if kind != "system_dp" or self.system_dp_size > 1]
        if any(getattr(self, f"{kind}_rank") >= getattr(self, f"{kind}_size") for kind in kinds):
            raise ValueError("a rank is not one of its group")
        return self

    @property
    def data_parallel(self) -> tuple[int, int]:
        """Rank and size, as SGLang counts prefill groups."""
        if self.system_dp_size == 1:
            return self.attn_dp_rank, self.attn_dp_size
        return self.system_dp_rank, self.system_dp_size


class PDTrimBootstrapServer(CommonKVBootstrapServer):
    """Answers 403 to strangers, 400 to what is malformed, 409 to who would replace a rank; /health to everybody.

    Who registers a rank again with the same values is answered as the first time.
    """

    def _setup_routes(self) -> None:
        """Called before the server's thread starts."""
        self._signature = identity.signature_of(sglang_host.server_arguments())
        self._registered: dict[tuple[int, ...], Any] = {}  # what each rank has said of itself
        self.app = web.Application(middlewares=[self._guard], client_max_size=MOST_BODY_BYTES)
        super()._setup_routes()

    @web.middleware
    async def _guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        if request.path == "/health":
            return await handler(request)
        signature = request.headers.get(HEADER)
        if not signature or not self._signature.matches(
            signature, request.method, request.raw_path, await request.read()
        ):
            return web.Response(text="not signed with this cluster's secret, for this worker's plan", status=403)
        try:
            return await handler(request)
        except MALFORMED:
            return web.Response(text="malformed", status=400)

    async def _handle_route_put(self, request: web.Request) -> web.Response:
        data = await request.json()
        registration = Registration.model_validate(data)
        group, groups = registration.data_parallel
        sizes = (groups, registration.attn_cp_size, registration.attn_tp_size, registration.pp_size)
        if self.dp_size is not None and sizes != (self.dp_size, self.attn_cp_size, self.attn_tp_size, self.pp_size):
            return web.Response(text="the sizes are not those of the ranks that are registered", status=400)
        rank = (group, registration.attn_cp_rank, registration.attn_tp_rank, registration.pp_rank)
        before = self._registered.setdefault(rank, data)
        if before is not data:  # SGLang asks once more when the answer was late
            return web.Response(text="OK") if before == data else web.Response(text=ANOTHER_RANK, status=409)
        answer = await super()._handle_route_put(request)
        if answer.status != 200:
            del self._registered[rank]
        return answer
