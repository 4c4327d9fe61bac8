"""The codes of the wire by name: what one side (K or V) of a layer travels in."""

from pdtrim_deploy.kvcache.codecs.base import Codec
from pdtrim_deploy.kvcache.codecs.fp8 import Fp8
from pdtrim_deploy.kvcache.codecs.int8 import Int8
from pdtrim_deploy.kvcache.codecs.native import Native
from pdtrim_deploy.kvcache.codecs.rotated import INT3, INT4, Rotated
from pdtrim_deploy.plan.wire import Code

CODECS: dict[Code, Codec] = {
    "native": Native(),
    "fp8": Fp8(),
    "int8": Int8(),
    "int4": Rotated(INT4),
    "int3": Rotated(INT3),
}


def get_codec(name: str) -> Codec:
    """The codec of a code; KeyError lists the valid names."""
    for known, codec in CODECS.items():
        if known == name:
            return codec
    raise KeyError(f"unknown wire code {name!r}; use one of {', '.join(CODECS)}")
