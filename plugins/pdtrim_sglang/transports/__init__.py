"""What moves packed KV between two workers. To add one: a file here, a name in `TRANSPORTS`."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from pdtrim_sglang.transports.base import ChannelListener, ChunkHandler, Mover, TransportConfig
from pdtrim_sglang.transports.channel import SendChannel
from pdtrim_sglang.transports.mooncake import mooncake_writer, refuses_device
from pdtrim_sglang.transports.nixl import nixl_writer
from pdtrim_sglang.transports.one_sided import OneSided
from pdtrim_sglang.transports.server import ReceiveServer
from pdtrim_sglang.transports.tcp import Inline

__all__ = ["TRANSPORTS", "ReceiveServer", "SendChannel", "Transport", "TransportConfig", "transport_named"]


@dataclass(frozen=True)
class Transport:
    """The stream, which all transports share, with a mover of payloads."""

    mover: Mover

    def slots_near(self, pool: torch.device, config: TransportConfig) -> TransportConfig:
        """`config` with the `device` of its staging slots, for a KV pool on device `pool`.

        RuntimeError, one sentence, when `slots` is `device` and they cannot be there.
        """
        if config.slots == "host" or (config.slots == "auto" and not self.mover.on_device):
            return config
        reason = self.mover.refuses_device() if pool.type == "cuda" else f"the KV pool is on the {pool.type}"
        if not reason:
            return replace(config, device=pool)
        if config.slots == "device":
            raise RuntimeError(
                f"pdtrim: staging slots cannot be on a GPU: {reason}; give both workers --transport-option slots=host"
            )
        return config

    def prepare(self, local_host: str, config: TransportConfig) -> None:
        """At a prefill worker's start: RuntimeError, one sentence, when this transport cannot be used here."""
        self.mover.prepare(local_host, config)

    def channel(self, host: str, port: int, listener: ChannelListener, config: TransportConfig) -> SendChannel:
        """Prefill's end, to the decode worker that listens there; it connects when it first sends."""
        return SendChannel(host, port, listener, config, self.mover.sender(host, config))

    def server(self, host: str, handler: ChunkHandler, config: TransportConfig) -> ReceiveServer:
        """Decode's end, listening at `host`. RuntimeError as of `prepare`."""
        return ReceiveServer(host, handler, config, self.mover.receiver(host, config))


# Libraries load when an end is made, or prepared.
TRANSPORTS: dict[str, Transport] = {
    "tcp": Transport(Inline()),
    "nixl": Transport(OneSided(nixl_writer)),
    "mooncake": Transport(OneSided(mooncake_writer, refuses_device, on_device=False)),
}


def transport_named(name: str) -> Transport:
    """A transport; ValueError lists the valid names."""
    if name not in TRANSPORTS:
        raise ValueError(f"no transport {name!r}; valid: {', '.join(sorted(TRANSPORTS))}")
    return TRANSPORTS[name]
