"""Both ends of bench-transport, in the serve environment: `send ROWS ROW_BYTES ROUNDS SEED` starts `receive` itself."""

from __future__ import annotations

import json
import os
import queue
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from pdtrim_sglang.protocol import ChunkHeader, Reply
from pdtrim_sglang.transports import TRANSPORTS, TransportConfig, transport_named
from pdtrim_sglang.transports.mooncake import mooncake_writer
from pdtrim_sglang.transports.nixl import nixl_writer

MOST_MOONCAKE = 256
HOST, MOST_PARTS, LIBRARIES = "127.0.0.1", 1024, ("nixl", "mooncake")


class World:
    """A pool of twice as many rows, and the places of those that travel, other places at each end."""

    def __init__(self, end: str, rows: int, row_bytes: int, rounds: int, seed: int) -> None:
        self.rows, self.row_bytes, self.rounds = rows, row_bytes, rounds
        dice = torch.Generator().manual_seed(seed + (end == "receive"))
        self.pool = torch.randint(-(1 << 62), 1 << 62, (2 * rows, row_bytes // 8), generator=dice)
        self.places = torch.randperm(2 * rows, generator=dice)[:rows]
        self.total = rows * row_bytes
        self.config = TransportConfig(staging_bytes=self.total, accept_unauthenticated=True)

    def pieces(self) -> list[memoryview]:
        """The rows where they lie."""
        whole, size = memoryview(self.pool.view(torch.uint8).view(-1).numpy()), self.row_bytes
        return [whole[place * size : (place + 1) * size] for place in self.places.tolist()]

    def addresses(self) -> list[int]:
        return [self.pool.data_ptr() + place * self.row_bytes for place in self.places.tolist()]

    # What a transport's server asks of its owner.
    def connections_changed(self) -> None:
        pass

    def admit(self, header: ChunkHeader) -> None:
        pass

    def deliver(self, header: ChunkHeader, payload: torch.Tensor, aux: memoryview) -> Reply:
        self.pool.index_copy_(0, self.places, payload.view(torch.int64).view(self.rows, -1))
        return Reply(header.room)

    def gather(self, staging: torch.Tensor) -> memoryview:
        """The rows in one buffer (uint8)."""
        torch.index_select(self.pool, 0, self.places, out=staging.view(torch.int64).view(self.rows, -1))
        return staging.numpy().data


def usable(name: str) -> bool:
    try:
        transport_named(name).prepare(HOST, TransportConfig(accept_unauthenticated=True))
    except RuntimeError:
        return False
    return True


def writer_of(name: str, role: str, world: World) -> Any:
    """The library behind a transport's ends of this process."""
    return {"nixl": nixl_writer, "mooncake": mooncake_writer}[name](role, HOST, world.config)


def receive(world: World) -> None:
    """Say where everything is, take plain sockets' bytes, and tell the sum of the rows when asked."""
    servers = {name: transport_named(name).server(HOST, world, world.config) for name in TRANSPORTS if usable(name)}
    places: dict[str, Any] = {"ports": {name: server.port for name, server in servers.items()}}
    listener, control = socket.create_server((HOST, 0)), socket.create_server((HOST, 0))
    places |= {"socket": listener.getsockname()[1], "control": control.getsockname()[1], "addresses": world.addresses()}
    kept = []
    for name in LIBRARIES:
        if name in servers:
            writer = writer_of(name, "receive", world)
            writer.register(world.pool.view(torch.uint8).view(-1))
            places[name] = writer.place(world.pool.view(torch.uint8).view(-1)).decode()
            kept.append(writer)
    print(json.dumps(places), flush=True)
    data, _ = listener.accept()
    orders, _ = control.accept()
    lines = orders.makefile("r")
    staging = bytearray(world.total)
    for line in lines:
        if line == "packed\n":
            _fill(data, memoryview(staging))
            world.deliver(_header(world, 0), torch.frombuffer(staging, dtype=torch.uint8), memoryview(b""))
        elif line == "scattered\n":
            for piece in world.pieces():
                _fill(data, piece)
        elif line == "clear\n":
            world.pool.zero_()
        if line == "sum\n":
            orders.sendall(f"{int(world.pool[world.places].sum())}\n".encode())
        else:
            orders.sendall(b"done\n")


def _fill(connection: socket.socket, view: memoryview) -> None:
    while view:
        view = view[connection.recv_into(view) :]


def _header(world: World, room: int) -> ChunkHeader:
    return ChunkHeader(bytes(32), room, 0, world.rows, 0, world.rows, 0, world.total, False, range(1))


class Replies(queue.Queue):  # type: ignore[type-arg]
    """Of one channel."""

    def on_reply(self, reply: Reply) -> None:
        self.put(reply.reason)

    def on_lost(self, reason: str) -> None:
        self.put(reason)


def send(world: World, arguments: list[str]) -> list[dict[str, Any]]:
    child = subprocess.Popen([sys.executable, __file__, "receive", *arguments], stdout=subprocess.PIPE, text=True)
    assert child.stdout
    places = next(json.loads(line) for line in child.stdout if line.startswith("{"))
    data = socket.create_connection((HOST, places["socket"]))
    orders = socket.create_connection((HOST, places["control"]))
    answers = orders.makefile("r")

    def order(what: str) -> str:
        orders.sendall(f"{what}\n".encode())
        return answers.readline().strip()

    def over_socket(how: str, parts: Callable[[], list[memoryview]]) -> Callable[[], None]:
        def move() -> None:
            orders.sendall(f"{how}\n".encode())
            left = parts()
            while left:
                now, left = left[:MOST_PARTS], left[MOST_PARTS:]
                sent, whole = data.sendmsg(now), sum(map(len, now))
                if sent < whole:
                    data.sendall(b"".join(now)[sent:])
            assert answers.readline() == "done\n"

        return move

    def over(name: str) -> Callable[[], None]:
        replies = Replies()
        channel = transport_named(name).channel(HOST, places["ports"][name], replies, world.config)

        def move() -> None:
            world.gather(channel.slots[0])
            channel.send(_header(world, 1), memoryview(b""))
            reason = replies.get(timeout=60)
            assert not reason, reason

        return move

    def memcpy() -> None:
        world.gather(staging)
        other.index_copy_(0, world.places, staging.view(torch.int64).view(world.rows, -1))

    other, staging = torch.zeros_like(world.pool), torch.zeros(world.total, dtype=torch.uint8)
    moves: dict[str, Callable[[], None]] = {
        "memcpy": memcpy,
        "socket packed": over_socket("packed", lambda: [world.gather(staging)]),
        "socket scattered": over_socket("scattered", world.pieces),
    }
    moves |= {f"{name} packed": over(name) for name in places["ports"]}
    moves |= {f"{name} scattered": _scattered(name, world, places) for name in LIBRARIES if name in places["ports"]}
    seconds: dict[str, list[float]] = {name: [] for name in moves}
    expected_sum = str(int(world.pool[world.places].sum()))
    for round_ in range(world.rounds + 1):  # the first one connects
        for name, move in moves.items():
            order("clear")
            begun = time.perf_counter()
            move()
            took = time.perf_counter() - begun
            if round_:
                seconds[name].append(took)
            assert name == "memcpy" or order("sum") == expected_sum, f"{name} did not move the rows"
    child.kill()
    rates = {name: [world.total / elapsed / 1e9 for elapsed in times] for name, times in seconds.items()}
    return [
        {"way": name, "bytes": world.total, "median_gb_s": median(r), "least_gb_s": min(r), "most_gb_s": max(r)}
        for name, r in rates.items()
    ]


def _scattered(name: str, world: World, places: dict[str, Any]) -> Callable[[], None]:
    """Each row its own piece of one transfer of the library."""
    writer = writer_of(name, "send", world)
    writer.register(world.pool.view(torch.uint8).view(-1))
    target = writer.reach(places[name].encode())
    sources, targets, sizes = world.addresses(), places["addresses"], [world.row_bytes] * world.rows

    def nixl() -> None:
        agent = writer._agent
        local = agent.get_xfer_descs([(at, world.row_bytes, 0) for at in sources], "DRAM")
        remote = agent.get_xfer_descs([(at, world.row_bytes, 0) for at in targets], "DRAM")
        handle = agent.initialize_xfer("WRITE", local, remote, target[0], b"")
        state = agent.transfer(handle)
        while state == "PROC":
            time.sleep(20e-6)
            state = agent.check_xfer_state(handle)
        agent.release_xfer_handle(handle)
        assert state == "DONE"

    def mooncake() -> None:
        for at in range(0, world.rows, MOST_MOONCAKE):  # more at once fail over TCP (0.3.13.post1)
            part = slice(at, at + MOST_MOONCAKE)
            assert writer._engine.batch_transfer_sync_write(target[0], sources[part], targets[part], sizes[part]) == 0

    return {"nixl": nixl, "mooncake": mooncake}[name]


if __name__ == "__main__":
    end, *sizes = sys.argv[1:]
    world = World(end, *map(int, sizes))
    if end == "receive":
        receive(world)
    else:
        print(json.dumps(send(world, sizes)), flush=True)
        os._exit(0)  # threads of Mooncake's engines may crash the interpreter's end
