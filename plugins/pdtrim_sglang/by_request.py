"""What a prefill worker knows of each request that it computes, by SGLang's request id and by room."""

from __future__ import annotations

from typing import Generic, TypeVar

T = TypeVar("T")


class ByRequest(Generic[T]):
    """One value a request. A request that is sent again, under its id but to another room, takes the place of the old.

    SGLang may close the old room later: that forgets nothing of the new one.
    """

    def __init__(self) -> None:
        self._values: dict[str, tuple[int, T]] = {}
        self._rids: dict[int, str] = {}

    def put(self, rid: str, room: int, value: T) -> None:
        """Request `rid` will be sent to `room`."""
        self.forget(room)
        self._values[rid], self._rids[room] = (room, value), rid

    def forget(self, room: int) -> None:
        """Nothing more will be sent there."""
        rid = self._rids.pop(room, "")
        if rid in self._values and self._values[rid][0] == room:
            del self._values[rid]

    def get(self, rid: str) -> T | None:
        """That of the request; None where none is expected."""
        known = self._values.get(rid)
        return None if known is None else known[1]

    def of_room(self, room: int) -> T | None:
        """That of the request which is sent there; None where that is no longer, or was sent again elsewhere."""
        known = self._values.get(self._rids.get(room, ""))
        return known[1] if known is not None and known[0] == room else None

    def __len__(self) -> int:
        """Requests that are expected."""
        return len(self._values)
