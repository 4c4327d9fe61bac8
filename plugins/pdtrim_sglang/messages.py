"""Control messages that a decode worker pushes to a prefill worker over SGLang's ZMQ socket: two JSON frames."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field, ValidationError

REGISTER, ROOM = b"PDTRIM-REGISTER", b"PDTRIM-ROOM"
MAX_BYTES = 4096
UNREGISTERED = "never registered"  # in the reason of a failure: decode registers again before its next room


class _Message(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    session: str = Field(max_length=128)
    host: str = Field(max_length=128)
    control_port: int = Field(ge=1, le=65535)


class Register(_Message):
    """Sent once a prefill rank: who I am, what plan I serve, where my transport listens, which attention rank I am."""

    protocol: int
    digest: str = Field(pattern=r"^[0-9a-f]{64}$")
    data_port: int = Field(ge=1, le=65535)
    tp_size: int = Field(ge=1, lt=1 << 16)
    tp_rank: int = Field(ge=0, lt=1 << 16)
    aux_item_bytes: tuple[int, ...]

    def frames(self) -> list[bytes]:
        """ZMQ frames."""
        return [REGISTER, self.model_dump_json().encode()]


class Room(_Message):
    """Sent once a request and prefill rank: its destination is allocated, chunks may come.

    `destinations` is how many ranks of decode send this rank of prefill the like.
    """

    room: int = Field(ge=0, lt=1 << 64)
    prompt_tokens: int = Field(ge=1)
    prefix_tokens: int = Field(ge=0)
    destinations: int = Field(ge=1)

    def frames(self) -> list[bytes]:
        """ZMQ frames."""
        return [ROOM, self.model_dump_json().encode()]


def parse(frames: list[bytes]) -> Register | Room | None:
    """The message in `frames`; None when it is not one of ours or malformed."""
    if len(frames) != 2 or len(frames[1]) > MAX_BYTES:
        return None
    kinds: dict[bytes, type[Register] | type[Room]] = {REGISTER: Register, ROOM: Room}
    try:
        return kinds[frames[0]].model_validate_json(frames[1])
    except (KeyError, ValidationError):
        return None
