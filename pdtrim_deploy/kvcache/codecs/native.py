"""native: the pool's own bytes."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from pdtrim_deploy.kvcache.codecs.base import Codec, Index, Less, take


class Native(Codec):
    """Exact."""

    def encode(self, pool: Tensor, index: Index, sections: Sequence[Tensor], less: Less | None = None) -> None:
        take(pool, index, out=sections[0])

    def decode(self, sections: Sequence[Tensor]) -> Tensor:
        return sections[0]
