"""The two ends of a transport: a channel that sends staged chunks, a server that receives them."""

from __future__ import annotations

import socket
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from pdtrim_deploy.worker.transport import TransportOptions
from pdtrim_sglang.protocol import ChunkHeader, Reply
from pdtrim_sglang.transports.handshake import Credentials


@dataclass(frozen=True)
class TransportConfig:
    """Sizes, deadlines and credentials, the same on both sides.

    Attributes:
        staging_bytes: capacity of one staging buffer; longer chunks are cut by the scheduler.
        connect_seconds: deadline to reach a decode worker, and again to know each other.
        stall_seconds: longest silence inside a frame, or between a request's last chunk and its reply.
        connections: most prefill workers that a server keeps at once, and most that have not shown yet who they are:
            of more such the oldest is dropped.
        port: where a decode worker listens; 0: wherever the system says.
        announce: `host:port` at which prefill workers reach it, where that is another (a forwarded port, a proxy).
        accept_unauthenticated: the user knows that this transport lets strangers write, and wants it all the same.
        protocol, devices: what Mooncake is to use (`tcp`, `rdma`; device names, comma-separated).
        credentials: what a connection's ends show each other before the first chunk.

    """

    staging_bytes: int = 64 << 20
    connect_seconds: float = 5.0
    stall_seconds: float = 30.0
    connections: int = 256
    port: int = 0
    announce: str = ""
    accept_unauthenticated: bool = False
    protocol: str = "tcp"
    devices: str = ""
    credentials: Credentials = field(default_factory=Credentials)

    @classmethod
    def of(cls, options: TransportOptions, credentials: Credentials) -> TransportConfig:
        """What the worker was told, and the defaults for the rest."""
        return cls(**options.model_dump(exclude_none=True), credentials=credentials)


class TransportError(Exception):
    """A chunk could not be handed over; the message says to whom and why."""


class UnreachableError(TransportError):
    """The decode worker cannot be reached now: what waits for it need not try again."""


def missing(transport: str, package: str, error: ImportError) -> RuntimeError:
    """What to raise when a transport's library is not installed."""
    return RuntimeError(
        f"pdtrim: transport {transport} needs a library that cannot be loaded ({error}); install it into the serve "
        f"environment: pip install --no-deps {package}, or use --transport tcp"
    )


def refuse_strangers(transport: str, library: str, config: TransportConfig) -> None:
    """RuntimeError unless the user has said that nobody else can reach the workers."""
    if not config.accept_unauthenticated:
        raise RuntimeError(
            f"pdtrim: transport {transport} is refused: {library} listens on every network device without "
            "authentication, so whoever reaches this machine can write into the worker's memory; on a network of its "
            'own say so: --json-model-override-args \'{"pdtrim_transport": {"accept_unauthenticated": true}}\', or use '
            "--transport tcp"
        )


def staging_buffer(size: int) -> Tensor:
    """Host memory, uint8 `[size]`; pinned where there is a GPU, whose copies are then direct."""
    return torch.empty(size, dtype=torch.uint8, pin_memory=torch.cuda.is_available())


def own_address(host: str) -> str:
    """The address of this machine that `host` sees."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, 9))  # sends nothing
        return str(probe.getsockname()[0])


class ChunkHandler(Protocol):
    """What a server does with a chunk; called in the connection's own thread."""

    def admit(self, header: ChunkHeader) -> None:
        """Raise ProtocolError unless the lengths in `header` are those of the plan."""

    def deliver(self, header: ChunkHeader, payload: Tensor, aux: memoryview) -> Reply:
        """Scatter `payload` (uint8) and `aux`; both are only valid during the call."""

    def connections_changed(self) -> None:
        """A connection came or went: `ReceiveServer.held` says something else."""


class ChannelListener(Protocol):
    """What a channel tells its owner; called in the channel's own thread."""

    def on_reply(self, reply: Reply) -> None:
        """The peer answered one chunk."""

    def on_lost(self, reason: str) -> None:
        """The connection broke: chunks without a reply will get none."""


class SendChannel(ABC):
    """Sends chunks to one decode worker, in order; owned by one thread.

    `staging` is the registered uint8 buffer `[staging_bytes]` that a payload from the pool is packed into.
    """

    staging: Tensor

    @classmethod  # noqa: B027 (most need nothing)
    def prepare(cls, local_host: str, config: TransportConfig) -> None:
        """At a prefill worker's start: RuntimeError, one sentence, when this transport cannot be used here."""

    @abstractmethod
    def send(self, header: ChunkHeader, aux: memoryview, payload: Sequence[memoryview] | None = None) -> int:
        """Send a payload and `aux`; all memory may be reused when this returns.

        Args:
            payload: its pieces in order, `header.payload_bytes` together; by default the beginning of `staging`.

        Returns:
            bytes put on the wire, header included.

        Raises:
            TransportError: not connected, or the connection broke. The next `send` connects anew.

        """

    @abstractmethod
    def abandon(self) -> None:
        """From any thread: the connection has gone silent. Break it, so that its owner hears `on_lost`."""

    @abstractmethod
    def close(self) -> None:
        """Drop the connection."""


class ReceiveServer(ABC):
    """Receives chunks from prefill workers and passes them to a `ChunkHandler`."""

    host: str
    port: int

    @abstractmethod
    def held(self) -> tuple[int, int]:
        """Connections that are open, and bytes of staging memory that they hold."""

    @abstractmethod
    def close(self) -> None:
        """Stop accepting and drop all connections."""
