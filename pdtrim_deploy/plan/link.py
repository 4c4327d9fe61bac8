"""The link between prefill and decode, as people write it: 25Gbps, 40GB/s."""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import Decimal

from pdtrim_deploy.errors import UserError

_POWER = {"": 0, "k": 3, "m": 6, "g": 9, "t": 12}
# Only the b of bits and the B of bytes are case-sensitive.
_BITS = {"bps": 1, "b/s": 1, "bit/s": 1, "Bps": 8, "B/s": 8}
_TEXT = re.compile(r"(\d{1,9}(?:\.\d{1,9})?) ?([kKmMgGtT]?)(" + "|".join(_BITS) + ")")


@dataclass(frozen=True)
class Link:
    """Speed in one direction, shared by all requests; decimal units: 1 Gb/s is 10^9 bits/s."""

    bits_per_s: float

    @property
    def bytes_per_s(self) -> float:
        """The same in bytes."""
        return self.bits_per_s / 8

    @classmethod
    def parse(cls, text: str) -> Link:
        """`25Gbps`, `100Gb/s`, `3.2Tbps`, `40GB/s`; UserError for anything else, and for a speed of 0."""
        match = _TEXT.fullmatch(text.strip())
        speed = Decimal(match[1]).scaleb(_POWER[match[2].lower()]) * _BITS[match[3]] if match else Decimal(0)
        if not speed:
            raise UserError(
                f"{text!r} is not a link speed; give a number above 0 and its unit: bits such as 25Gbps, 100Gb/s or "
                f"3.2Tbps, bytes such as 40GB/s"
            )
        return cls(float(speed))

    def __str__(self) -> str:
        for prefix in ("T", "G", "M", "k"):
            if self.bits_per_s >= 10 ** _POWER[prefix.lower()]:
                return f"{self.bits_per_s / 10 ** _POWER[prefix.lower()]:.4g} {prefix}b/s"
        return f"{self.bits_per_s:.4g} b/s"
