"""The decode worker's side of a transfer: it announces rooms, receives chunks and scatters them."""

from __future__ import annotations

import logging
from typing import Any

from sglang.srt.disaggregation.base.conn import KVPoll
from torch import Tensor
from torch.nn.functional import pad

from pdtrim_deploy.kvcache.layout import chunk_layout
from pdtrim_deploy.plan import PDPlan
from pdtrim_deploy.plan.heads import sent_heads
from pdtrim_sglang import vital
from pdtrim_sglang.messages import Register
from pdtrim_sglang.messages import Room as RoomMessage
from pdtrim_sglang.metrics import Held, HeldMetrics
from pdtrim_sglang.pool import PoolView
from pdtrim_sglang.protocol import VERSION, ChunkHeader, ProtocolError, Reply
from pdtrim_sglang.rooms import AuxRows, DecodeRoom
from pdtrim_sglang.transports import ReceiveServer, TransportConfig, transport_named
from pdtrim_sglang.worker import Worker

logger = logging.getLogger("sglang.srt.pdtrim.decode")
# What prefill may say here. Success is known from the last chunk, never from a message.
CONTROL_STATUSES = (KVPoll.Failed, KVPoll.WaitingForInput)


class DecodeSide:
    """Chunk handler of this worker's receive server, and the keeper of its rooms."""

    def __init__(
        self,
        manager: Worker,
        plan: PDPlan,
        pool: PoolView,
        aux: AuxRows,
        transport: str,
        config: TransportConfig,
    ) -> None:
        self._manager, self._plan, self._pool, self._aux, self._config = manager, plan, pool, aux, config
        self._digest = bytes.fromhex(pool.digest(plan))
        self._rooms: dict[int, DecodeRoom] = {}
        self._metrics = HeldMetrics()
        self._server: ReceiveServer | None = None
        self._server = server = transport_named(transport).server(manager.local_ip, self, config)
        self.session = config.announce or f"{server.host}:{server.port}"
        vital.start("control channel", self._control)

    def register_message(self) -> list[bytes]:
        """Sent once to each prefill rank, before its first room."""
        manager, (host, _, port) = self._manager, self.session.rpartition(":")
        return Register(
            session=self.session,
            host=host,
            control_port=manager.rank_port,
            protocol=VERSION,
            digest=self._digest.hex(),
            data_port=int(port),
            tp_size=manager.attn_tp_size,
            tp_rank=manager.attn_tp_rank,
            aux_item_bytes=self._aux.item_bytes,
        ).frames()

    def room_message(self, room: int, prompt_tokens: int, prefix_tokens: int, destinations: int) -> list[bytes]:
        """Sent once a request and prefill rank."""
        manager = self._manager
        return RoomMessage(
            session=self.session,
            host=manager.local_ip,
            control_port=manager.rank_port,
            room=room,
            prompt_tokens=prompt_tokens,
            prefix_tokens=prefix_tokens,
            destinations=destinations,
        ).frames()

    def open_room(
        self,
        room: int,
        prompt_tokens: int,
        prefix_tokens: int,
        pages: Any,
        aux_index: int,
        free: Any = None,
        row: int | None = None,
        *,
        prefill_ranks: int,
        state_slot: int | None = None,
    ) -> None:
        """Accept chunks for a request whose destination `pages` (int32) SGLang has just allocated.

        Attention has `prefill_ranks` ranks in the prefill worker, or in its data-parallel group, that computes it.
        They are scattered once the device event `free` has come, when there is one. `row` is the request's in SGLang's
        `req_to_token`, `state_slot` its slot in the pool of states.
        """
        start, slots = self._plan.first_sent(prefix_tokens), self._pool.slots(pages, prompt_tokens - prefix_tokens)
        slots = pad(slots, (prefix_tokens - start, 0))  # reused rows of full layers are not written
        places, ready = self._pool.destinations(slots, row), (free, self._pool.record_event())
        senders = self.senders(prefill_ranks)
        request = room, prompt_tokens, prefix_tokens, places, aux_index, ready
        self._rooms[room] = DecodeRoom(*request, senders=senders, state_slot=state_slot)
        self.connections_changed()

    def pair(self, prefill_ranks: int) -> int:
        """A prefill worker of so many attention ranks was met: how many of them send to this rank."""
        senders = self.senders(prefill_ranks)
        self._pool.prepare(self._plan, *senders.values())
        return len(senders)

    def senders(self, prefill_ranks: int) -> dict[int, range]:
        """The KV heads that each rank of prefill sends to this one; ranks with copies of them send nothing."""
        ranks = prefill_ranks, self._manager.attn_tp_size, self._manager.attn_tp_rank
        return sent_heads(self._plan.model.num_kv_heads, *ranks)

    def close_room(self, room: int) -> None:
        """Accept no more: call before SGLang may free the pages. Waits for a scatter under way."""
        entry = self._rooms.pop(room, None)
        if entry is not None:
            entry.close()
            self.connections_changed()

    def connections_changed(self) -> None:
        """Write down what is held now."""
        self._metrics.held(self._held)

    def _held(self) -> Held:
        connections, staging_bytes = self._server.held() if self._server is not None else (0, 0)
        return Held(len(self._rooms), staging_bytes, connections)

    def admit(self, header: ChunkHeader) -> None:
        """The lengths must be the plan's, before a byte of the body is read."""
        if header.digest != self._digest:
            raise ProtocolError(f"chunk of plan {header.digest.hex()}, this worker serves {self._digest.hex()}")
        tokens = header.prompt_tokens
        if tokens > self._pool.tokens:
            raise ProtocolError(f"a prompt of {tokens} tokens does not fit this worker's KV pool")
        held, heads = self._pool.heads, header.heads
        if not held.start <= heads.start < heads.stop <= held.stop:
            raise ProtocolError(
                f"chunk of KV heads {heads.start} to {heads.stop - 1}, this rank has {held.start} to {held.stop - 1}"
            )
        states = self._pool.states
        if header.states is not None and (states is None or header.states.stop > states.layers):
            raise ProtocolError(
                f"states of layers {header.states.start} to {header.states.stop - 1}, this worker has "
                f"{0 if states is None else states.layers}"
            )
        if header.layers is not None and header.layers.stop > len(self._plan.kv):
            raise ProtocolError(
                f"chunk of layers {header.layers.start} to {header.layers.stop - 1}, the plan has {len(self._plan.kv)}"
            )
        rows = len(heads), header.layers, header.reused_tokens
        layout = chunk_layout(self._plan, tokens, header.start, header.stop, *rows)
        aux_bytes = self._aux.total_bytes if header.last and header.aux_bytes else 0  # of several senders one brings it
        draft_bytes = self._pool.draft_bytes(header.start, header.stop) if layout.has_last else 0
        payload_bytes = layout.total_bytes + draft_bytes
        if header.states is not None and states is not None:
            payload_bytes = len(header.states) * states.layer_bytes
        if (header.payload_bytes, header.aux_bytes) != (payload_bytes, aux_bytes):
            raise ProtocolError(
                f"chunk of {header.payload_bytes} + {header.aux_bytes} bytes, "
                f"the plan says {payload_bytes} + {aux_bytes}"
            )
        if header.payload_bytes > self._config.staging_bytes:
            raise ProtocolError(f"chunk of {header.payload_bytes} bytes is larger than the staging buffer")

    def deliver(self, header: ChunkHeader, payload: Tensor, aux: memoryview) -> Reply:
        """Scatter one chunk; after the last one the request is ready."""
        room = self._rooms.get(header.room)
        if room is None:
            return Reply(header.room, "the request has ended on the decode side")
        try:
            reason = room.take(self._plan, self._pool, self._aux, header, payload, aux)
        except Exception as error:  # out of GPU memory, say
            logger.exception("pdtrim: a chunk was not taken in")
            reason = f"decode cannot take the KV in: {error}"
        if reason:
            self._conclude(header, KVPoll.Failed, reason)
        elif header.last:
            self._conclude(header, KVPoll.Success)
        return Reply(header.room, reason)

    def _conclude(self, header: ChunkHeader, status: int, reason: str | None = None) -> None:
        self._manager.apply_prefill_status(
            bootstrap_room=header.room, status=status, prefill_rank=header.rank, failure_reason=reason
        )

    def _control(self) -> None:
        """Prefill's word that a request failed there."""
        while True:
            frames = self._manager.server_socket.recv_multipart()
            try:
                self._handle(frames)
            except Exception:  # one bad message must not end the thread that all requests need
                logger.exception("pdtrim: control message failed")

    def _handle(self, frames: list[bytes]) -> None:
        parsed = self._manager.parse_kv_status_message(frames)
        if parsed is None:
            return
        room, status, rank, reason = parsed
        if status not in CONTROL_STATUSES:
            return
        self._manager.apply_prefill_status(bootstrap_room=room, status=status, prefill_rank=rank, failure_reason=reason)
