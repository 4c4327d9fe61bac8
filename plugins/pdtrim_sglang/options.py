"""What a worker is told of its transport, beside SGLang's own options: under `pdtrim_transport` of
`--json-model-override-args`, the one way to hand a worker something that SGLang does not know.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pdtrim_sglang.transports import TransportConfig
from pdtrim_sglang.transports.handshake import Credentials

TRANSPORT = "pdtrim_transport"


class TransportOptions(BaseModel):
    """Sizes, deadlines and addresses; what is left out is `TransportConfig`'s default."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    staging_bytes: int | None = Field(None, ge=1 << 16, le=1 << 34)
    connect_seconds: float | None = Field(None, gt=0)
    stall_seconds: float | None = Field(None, gt=0)
    connections: int | None = Field(None, ge=1)
    port: int | None = Field(None, ge=1, le=65535)
    announce: str | None = Field(None, pattern=r"^[^\s:]+:\d{1,5}$")
    accept_unauthenticated: bool | None = None
    protocol: Literal["tcp", "rdma"] | None = None
    devices: str | None = Field(None, max_length=1000)


def transport_config(override_args: str, credentials: Credentials) -> TransportConfig:
    """The worker's transport; RuntimeError, one sentence, when it was told something that it does not know."""
    try:
        asked = TransportOptions.model_validate(json.loads(override_args or "{}").get(TRANSPORT, {}))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, (TRANSPORT, *first["loc"])))
        valid = ", ".join(sorted(TransportOptions.model_fields))
        raise RuntimeError(f"pdtrim: {place} in --json-model-override-args: {first['msg']}; valid: {valid}") from None
    return replace(TransportConfig(credentials=credentials), **asked.model_dump(exclude_none=True))
