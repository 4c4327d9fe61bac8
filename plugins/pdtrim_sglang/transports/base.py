"""What the two ends of a transport share: sizes and deadlines, errors, who is told of chunks, and what moves payloads.

A transport is a stream and a mover. The stream (`SendChannel`, `ReceiveServer`) is the same for all: a TCP connection
with a handshake, headers, aux rows, replies and deadlines. The mover gets the payload's bytes across: on the stream
itself (`tcp.py`), or by a library that writes into the other process's memory (`one_sided.py`).
"""

from __future__ import annotations

import logging
import socket
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from pdtrim_deploy.worker.transport import TransportOptions
from pdtrim_sglang.protocol import ChunkHeader, ProtocolError, Reply
from pdtrim_sglang.transports.handshake import Credentials, HandshakeError

LAST_PORT = 65535
logger = logging.getLogger("sglang.srt.pdtrim.transport")


@dataclass(frozen=True)
class TransportConfig:
    """Sizes, deadlines and credentials, the same on both sides.

    Attributes:
        staging_bytes: capacity of one staging slot; longer chunks are cut by the scheduler.
        staging_slots: of each connection, at each end: one is packed or scattered while another one travels.
        part_bytes: least bytes of a part that leaves while its forward pass runs (`layerwise.py`).
        connect_seconds: deadline to reach a decode worker, and again to know each other.
        stall_seconds: longest silence inside a frame, or between a request's last chunk and its reply.
        connections: most prefill workers that a server keeps at once, and most that have not shown yet who they are:
            of more such the oldest is dropped.
        port: where a decode worker's first rank listens, rank R at `port` + R; 0: wherever the system says.
        announce: `host:port` at which prefill workers reach it, where that is another (a forwarded port, a proxy);
            rank R is at that port + R.
        accept_unauthenticated: the user knows that this transport lets strangers write, and wants it all the same.
        protocol: what Mooncake is to use, `tcp` or `rdma`.
        devices: the network devices that Mooncake and NIXL are to use, comma-separated; none: those that they find.
        slots: the memory of staging slots, `host`, `device` or `auto`; `Transport.slots_near` decides.
        device: the GPU in whose memory they are; None: on the host.
        credentials: what a connection's ends show each other before the first chunk.

    """

    staging_bytes: int = 32 << 20
    staging_slots: int = 2
    part_bytes: int = 1 << 20
    connect_seconds: float = 5.0
    stall_seconds: float = 30.0
    connections: int = 256
    port: int = 0
    announce: str = ""
    accept_unauthenticated: bool = False
    protocol: str = "tcp"
    devices: str = ""
    slots: str = "auto"
    device: torch.device | None = None
    credentials: Credentials = field(default_factory=Credentials)

    @classmethod
    def of(
        cls, options: TransportOptions, credentials: Credentials, ib_devices: str = "", rank: int = 0
    ) -> TransportConfig:
        """What rank `rank` of a worker is to use: its options, else SGLang's `ib_devices`, and the defaults.

        Raises:
            RuntimeError: there is no port left for this rank.

        """
        settings = options.model_dump(exclude_none=True)
        if ib_devices:
            settings = {"devices": ib_devices, "protocol": "rdma"} | settings
        if "port" in settings:
            settings["port"] = _port_of(settings["port"], rank)
        if "announce" in settings:
            host, _, port = settings["announce"].rpartition(":")
            settings["announce"] = f"{host}:{_port_of(int(port), rank)}"
        return cls(**settings, credentials=credentials)


def _port_of(first: int, rank: int) -> int:
    if first + rank > LAST_PORT:
        raise RuntimeError(f"pdtrim: port {first} leaves none for rank {rank}, which takes {first} + {rank}: give less")
    return first + rank


class TransportError(Exception):
    """A chunk could not be handed over; the message says to whom and why."""


class UnreachableError(TransportError):
    """The decode worker cannot be reached now: what waits for it need not try again."""


def log_unforeseen(error: Exception) -> None:
    """Log the traceback of an error that is our own: a message that names the decode worker would hide it.

    What networks, machines and libraries do needs none: the message says it.
    """
    if not isinstance(error, (OSError, RuntimeError, UnicodeError, HandshakeError, ProtocolError)):
        logger.error("pdtrim: an error that nobody foresaw: please report it", exc_info=error)


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


def staging_buffer(size: int, device: torch.device | None = None) -> Tensor:
    """uint8 `[size]` on `device`, or on the host; there pinned where there is a GPU, whose copies are then direct."""
    if device is not None:
        return torch.empty(size, dtype=torch.uint8, device=device)
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
        """Scatter `payload` (uint8, on the host or the pool's GPU) and `aux`; both are only valid during the call."""

    def connections_changed(self) -> None:
        """A connection came or went: `ReceiveServer.held` says something else."""


class ChannelListener(Protocol):
    """What a channel tells its owner; called in the channel's own thread."""

    def on_reply(self, reply: Reply) -> None:
        """The peer answered one chunk."""

    def on_lost(self, reason: str) -> None:
        """The connection broke: chunks without a reply will get none."""


class SendLink(ABC):
    """One connection of a `SendMover`."""

    @abstractmethod
    def move(self, slot: int, size: int, payload: Sequence[memoryview]) -> Sequence[memoryview]:
        """Get a payload of `size` bytes across; returns what of it goes on the stream, between header and aux row.

        Its pieces lie in `slot`, each at its own place in the payload, or anywhere else; in a slot on a GPU the payload
        lies whole, and there are none. OSError when it cannot be got across: the connection is then given up.
        """

    @abstractmethod
    def answered(self) -> None:
        """The peer is done with one more chunk; called in the thread that reads replies."""

    @abstractmethod
    def lost(self) -> None:
        """The connection is over: a `move` that waits for an answer gets none. Called in that thread too."""


class SendMover(ABC):
    """Gets the payloads of one `SendChannel` across.

    `slots` are the uint8 buffers `[staging_bytes]` for them, `views` the bytes of those on the host.
    """

    def __init__(self, slots: Sequence[Tensor]) -> None:
        self.slots = tuple(slots)
        self.views = tuple(memoryview(slot.numpy().data) for slot in slots if slot.is_cpu)

    @abstractmethod
    def connected(self, connection: socket.socket) -> SendLink:
        """The ends of a new connection know each other. OSError when this mover cannot be used with that peer."""


class ReceiveLink(ABC):
    """One connection of a `ReceiveMover`; `held_bytes` is the memory that it keeps for it."""

    held_bytes: int = 0

    @abstractmethod
    def read(self, payload: Tensor, aux: Tensor) -> None:
        """Fill both, uint8, with a chunk's payload and aux row, whose lengths were admitted.

        `aux` is on the host, `payload` too or on a GPU, where the current stream fills it. OSError when the connection
        broke.
        """

    @abstractmethod
    def close(self) -> None:
        """The connection is over."""


class ReceiveMover(ABC):
    """Gets the payloads of one `ReceiveServer` in."""

    @abstractmethod
    def connected(self, connection: socket.socket) -> ReceiveLink:
        """The ends of a new connection know each other."""


class Mover(ABC):
    """One way to get payloads across: it makes both ends' movers.

    `on_device` says whether slots lie in a GPU's memory when nobody chose.
    """

    on_device = False

    def refuses_device(self) -> str:
        """Why slots cannot lie in a GPU's memory, in one clause; empty where they can."""
        return "it sends from host memory"

    def prepare(self, local_host: str, config: TransportConfig) -> None:  # noqa: B027 (most need nothing)
        """At a prefill worker's start: RuntimeError, one sentence, when it cannot be used here."""

    @abstractmethod
    def sender(self, host: str, config: TransportConfig) -> SendMover:
        """Of a channel to the decode worker at `host`."""

    @abstractmethod
    def receiver(self, host: str, config: TransportConfig) -> ReceiveMover:
        """Of a server at `host`."""
