"""What a worker can be told of its transport, beside SGLang's own options. Pure: no torch."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError, field_validator

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.plan.blocks import Frozen


class TransportOptions(Frozen):
    """Sizes, deadlines and addresses; what is left out is the default of `pdtrim_sglang.transports.TransportConfig`."""

    staging_bytes: int | None = Field(None, ge=1 << 16, le=1 << 34)
    staging_slots: int | None = Field(None, ge=1, le=16)
    part_bytes: int | None = Field(None, ge=1)
    connect_seconds: float | None = Field(None, gt=0, allow_inf_nan=False)
    stall_seconds: float | None = Field(None, gt=0, allow_inf_nan=False)
    connections: int | None = Field(None, ge=1)
    port: int | None = Field(None, ge=1, le=65535)
    announce: str | None = Field(None, pattern=r"^[^\s:]+:\d{1,5}$", max_length=128)
    accept_unauthenticated: bool | None = None
    protocol: Literal["tcp", "rdma"] | None = None
    devices: str | None = Field(None, max_length=1000)
    slots: Literal["auto", "host", "device"] | None = None

    @field_validator("announce")
    @classmethod
    def _has_a_port(cls, place: str | None) -> str | None:
        if place is not None and not 1 <= int(place.rpartition(":")[2]) <= 65535:
            raise ValueError("a port is one of 1 to 65535")
        return place

    @classmethod
    def parse(cls, texts: Iterable[str]) -> dict[str, Any]:
        """What each KEY=VALUE says, the value as YAML reads it; UserError for the first that no worker would take."""
        options: dict[str, Any] = {}
        for text in texts:
            key, equals, value = text.partition("=")
            if not key or not equals:
                raise UserError(f"--transport-option {text!r}: give KEY=VALUE, such as stall_seconds=10")
            if key not in cls.model_fields:
                raise UserError(f"--transport-option {text!r}: no such option; valid: {', '.join(cls.model_fields)}")
            try:
                read = cls.model_validate({key: yaml.safe_load(value)})
            except ValidationError as error:
                why = error.errors()[0]["msg"]
                raise UserError(f"--transport-option {text!r}: {why[0].lower()}{why[1:]}; mend the value") from None
            except (yaml.YAMLError, ValueError, LookupError, AttributeError, RecursionError):  # a bad date, tag, depth
                raise UserError(f"--transport-option {text!r}: the value is no YAML; put text in quotes") from None
            options |= read.model_dump(include={key})
        return options
