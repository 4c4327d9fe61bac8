"""What a worker is told of its transport, beside SGLang's own options: under `pdtrim_transport` of
`--json-model-override-args`, the one way to hand a worker something that SGLang does not know.
"""

from __future__ import annotations

import json
from dataclasses import replace

from pydantic import ValidationError

from pdtrim_deploy.transport_options import TransportOptions
from pdtrim_sglang.transports import TransportConfig
from pdtrim_sglang.transports.handshake import Credentials

TRANSPORT = "pdtrim_transport"


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
