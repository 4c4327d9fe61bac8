"""What layers that do not learn make of text, which training reads again and again."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from pdtrim_deploy.models.blockwise import Blockwise
from pdtrim_deploy.models.layer_run import LayerRun
from pdtrim_deploy.models.mapped import mapped


class FrozenStates:
    """Hidden states of the dense model for text, int64 `[batch, T]`, without the last token; no gradients.

    Args:
        dense: the dense model.
        shared: how many of its first layers the stages share and do not learn.
        judged: the first position whose last hidden state is wanted.
        folder: where states lie in mapped files, so that a text is run once; each text is then run by itself, so that
            its states do not depend on those beside it. Without a folder, or where its disk is full, the states of the
            last call alone are kept.

    """

    def __init__(self, dense: Blockwise, shared: int, judged: int, folder: Path | None = None) -> None:
        self._dense, self._shared, self._judged, self._folder = dense, shared, judged, folder
        self._by_text, self._kept = folder is not None, dict[bytes, Tensor]()
        self._last: tuple[Tensor, Tensor] | None = None

    def shared(self, ids: Tensor) -> Tensor:
        """Behind the shared layers, `[batch, T - 1, hidden]`."""
        return self._of(ids)[:, : ids.shape[1] - 1]

    def judged(self, ids: Tensor) -> Tensor:
        """Behind the last layer, of the positions that are judged: `[batch, T - 1 - judged, hidden]`."""
        return self._of(ids)[:, ids.shape[1] - 1 :]

    def _of(self, ids: Tensor) -> Tensor:
        """Both, one behind the other."""
        if self._last is None or self._last[0] is not ids:
            states = torch.cat([self._once(row) for row in ids.split(1)]) if self._by_text else self._run(ids)
            self._last = ids, states
        return self._last[1]

    def _once(self, row: Tensor) -> Tensor:
        key = row.cpu().numpy().tobytes()
        if key in self._kept:
            return self._kept[key].to(self._dense.home)
        states = self._run(row)
        if self._folder is not None:
            try:
                self._kept[key] = mapped(states, self._folder)
            except OSError:  # a full disk: what is kept stays, and others run again
                self._folder = None
        return states

    @torch.no_grad()
    def _run(self, ids: Tensor) -> Tensor:
        run = LayerRun(self._dense, [ids[:, :-1]])
        while run.layer < self._shared:
            run.advance()
        (shared,) = run.states
        (last,) = run.finish()
        return torch.cat([part.to(self._dense.home) for part in (shared, last[:, self._judged :])], dim=1)
