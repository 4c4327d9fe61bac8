"""A TCP proxy between the prefill worker's transport and the decode worker's, that can do what networks do."""

from __future__ import annotations

import contextlib
import random
import struct
import threading
import time
from collections.abc import Iterator

from strangers import HEADER, VERSION

from pdtrim_deploy.serving.relay import Relay

INTRODUCTION = 102  # bytes from prefill until it is let in (pdtrim_sglang.transports.handshake)
DELAY_S = 0.3
CHUNK = struct.pack("<4sH", b"PDTK", VERSION)  # what each begins with
PROMPT_TOKENS, HEADER_BYTES = struct.calcsize("<4sHHI32sQ"), struct.calcsize(HEADER) + 8  # with the checksum


class Proxy(Relay):
    """`fault` concerns bytes from prefill to decode:

    `drop`: none arrives; `hole`: 100 of them are missing; `delay`: each read waits; `corrupt`: a bit flips in each
    chunk; `truncate`: the connection ends inside a chunk; `cut`: connections end at once; `marked`: the checksum of
    each chunk of a prompt of `marked_tokens` tokens is wrong, and no other byte; `count`: nothing; `none`.
    """

    marked_tokens = 0

    def __init__(self, port: int, target: int, seed: int = 0) -> None:
        self.fault, self.hits, self._dice = "none", 0, random.Random(seed)
        self._alone, self._victim = False, 0
        super().__init__(port, target)

    @contextlib.contextmanager
    def doing(self, fault: str, alone: bool = False) -> Iterator[None]:
        """`with proxy.doing("drop"):`; connections made before are concerned too.

        `alone`: the first connection that carries a byte is the only one that is concerned.
        """
        self._alone, self._victim = alone, 0
        self.fault, self.hits = fault, 0
        try:
            yield
        finally:
            self.fault = "none"

    def passed(self, data: bytes, carried: int) -> tuple[bytes, bool]:
        """The first bytes are the handshake's: the fault is in what follows."""
        fault, middle = self.fault, len(data) // 2
        if fault == "none" or carried < INTRODUCTION:
            return data, False
        if fault == "marked":
            return self._mark(data), False
        self._victim = self._victim or threading.get_ident()  # a connection has a thread
        if self._alone and self._victim != threading.get_ident():
            return data, False
        self.hits += 1
        if fault == "corrupt":
            at = self._dice.randrange(len(data))
            return data[:at] + bytes([data[at] ^ 1 << self._dice.randrange(8)]) + data[at + 1 :], False
        if fault == "delay":
            time.sleep(DELAY_S)
        return {
            "count": (data, False),
            "delay": (data, False),
            "drop": (b"", False),
            "hole": (data[:middle] + data[middle + 100 :], False),
            "truncate": (data[:middle], True),
            "cut": (b"", True),
        }[fault]

    def _mark(self, data: bytes) -> bytes:
        """`data`, with a bit of each marked chunk's checksum flipped; a header that two reads share is let through."""
        spoiled, at = bytearray(data), data.find(CHUNK)
        while 0 <= at <= len(data) - HEADER_BYTES:
            (tokens,) = struct.unpack_from("<I", data, at + PROMPT_TOKENS)
            if tokens == self.marked_tokens:
                spoiled[at + HEADER_BYTES - 1] ^= 1
                self.hits += 1
            at = data.find(CHUNK, at + 1)
        return bytes(spoiled)
