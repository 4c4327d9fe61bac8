"""Whether a forward pass is still under way."""

from __future__ import annotations

from typing import Any


class ForwardPass:
    """One forward pass of prefill: on a GPU it ends when the device has come to `event`."""

    _returned, _event = False, None

    def returned(self, event: Any) -> None:
        """SGLang's call of it returned, with `event` recorded then; None on a CPU, where nothing is left to do."""
        self._event, self._returned = event, True

    @property
    def runs(self) -> bool:
        """Whether it has not ended. Any thread may ask."""
        return not self._returned or (self._event is not None and not self._event.query())
