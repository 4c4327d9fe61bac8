"""Mooncake's transfer engine: the wheel `mooncake-transfer-engine-non-cuda`, extra `transport-mooncake`.

TCP by default; `protocol: rdma` and `devices` for RDMA. It needs libibverbs, librdmacm and libnuma also for TCP.

IT LISTENS ON 0.0.0.0 WITHOUT AUTHENTICATION, whatever it is told: who can reach the machine can write into the
worker's registered memory. So it starts only when the user says `accept_unauthenticated`, even on loopback.
"""

from __future__ import annotations

import json
import time
from functools import cache
from typing import Any

from torch import Tensor

from pdtrim_sglang.transports.base import TransportConfig, missing, refuse_strangers
from pdtrim_sglang.transports.one_sided import Writer

POLL_S = 20e-6
DONE = 1  # of transfer_check_status; 0: under way, less: failed


class MooncakeWriter(Writer):
    """One transfer engine, without a metadata server (P2PHANDSHAKE)."""

    def __init__(self, host: str, protocol: str, devices: str) -> None:
        try:
            from mooncake.engine import TransferEngine
        except ImportError as error:
            raise missing("mooncake", "mooncake-transfer-engine-non-cuda==0.3.13.post1", error) from None
        super().__init__()
        self._engine = TransferEngine()
        if self._engine.initialize(host, "P2PHANDSHAKE", protocol, devices):
            raise RuntimeError(f"pdtrim: Mooncake cannot start on {host} with protocol {protocol} {devices}")
        self._session = f"{host}:{self._engine.get_rpc_port()}"

    def register(self, buffer: Tensor) -> None:
        if self._engine.register_memory(buffer.data_ptr(), len(buffer)):
            raise RuntimeError(f"pdtrim: Mooncake cannot register {len(buffer)} bytes of staging memory")

    def place(self, buffer: Tensor) -> bytes:
        return json.dumps({"session": self._session, "address": buffer.data_ptr(), "size": len(buffer)}).encode()

    def reach(self, place: bytes) -> Any:
        fields = json.loads(place)
        return str(fields["session"]), int(fields["address"]), int(fields["size"])

    def write(self, source: Tensor, size: int, target: Any, seconds: float) -> None:
        session, address, room = target
        if size > room:
            raise OSError(
                f"chunk of {size} bytes, the decode worker's staging buffer has {room}: use one staging_bytes"
            )
        deadline = time.monotonic() + seconds
        batch = self._engine.transfer_submit_write(session, source.data_ptr(), address, size)
        state = 0 if batch > 0 else -1
        while state == 0:
            if time.monotonic() > deadline:
                raise OSError(f"Mooncake did not write within {seconds:.0f} s")
            state = self._engine.transfer_check_status(batch)
            if state == 0:
                time.sleep(POLL_S)
        if state != DONE:
            raise OSError(f"Mooncake cannot write to {session}")


@cache
def _writer(role: str, host: str, protocol: str, devices: str) -> MooncakeWriter:
    return MooncakeWriter(host, protocol, devices)


def mooncake_writer(role: str, host: str, config: TransportConfig) -> MooncakeWriter:
    """The writer of a role (`send`, `receive`); RuntimeError, one sentence, when Mooncake cannot be used here."""
    refuse_strangers("mooncake", "Mooncake", config)
    return _writer(role, host, config.protocol, config.devices)
