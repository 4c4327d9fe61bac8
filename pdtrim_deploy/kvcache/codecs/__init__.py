"""The wire dtypes by name."""

from pdtrim_deploy.kvcache.codecs.base import Codec
from pdtrim_deploy.kvcache.codecs.fp8 import Fp8
from pdtrim_deploy.kvcache.codecs.int4 import Int4
from pdtrim_deploy.kvcache.codecs.int8 import Int8
from pdtrim_deploy.kvcache.codecs.native import Native
from pdtrim_deploy.wire import WireDtype

CODECS: dict[WireDtype, Codec] = {"native": Native(), "fp8": Fp8(), "int8": Int8(), "int4": Int4()}


def get_codec(name: str) -> Codec:
    """The codec of a wire dtype; KeyError lists the valid names."""
    for known, codec in CODECS.items():
        if known == name:
            return codec
    raise KeyError(f"unknown wire dtype {name!r}; use one of {', '.join(CODECS)}")
