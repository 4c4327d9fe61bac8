"""A real HTTP server on loopback that streams like SGLang's /generate and /v1/completions, with known latencies."""

from __future__ import annotations

import asyncio
import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.client import responses


@dataclass
class Behaviour:
    """`chunk` tokens an event; `lose` ends the stream early, `silent` leaves out [DONE], `hang` never answers."""

    ttft: float = 0.05
    itl: float = 0.01
    chunk: int = 1
    status: int = 200
    lose: int = 0
    silent: bool = False
    hang: bool = False
    error_event: bool = False
    garbage: bool = False
    encoding: str | None = None
    text: str = "x"
    finish_reason: str | None = None
    in_flight: int = 0
    most_in_flight: int = 0
    bodies: list[dict] = field(default_factory=list)


def slower() -> Iterator[int]:
    """Factors for the latencies of a server, to try one after the other until figures of it are near enough.

    A busy machine is late by the same seconds however slow the server is; where it is not busy there are two tries.
    """
    yield from (1, 1)
    if os.getloadavg()[0] > 2:
        yield from (4, 16)


@contextmanager
def serve(behaviour: Behaviour) -> Iterator[str]:
    """Base URL of a server in a thread of its own."""
    loop = asyncio.new_event_loop()
    server = loop.run_until_complete(asyncio.start_server(lambda r, w: _answer(behaviour, r, w), "127.0.0.1", 0))
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        for task in asyncio.all_tasks(loop):
            task.cancel()
        server.close()
        loop.run_until_complete(asyncio.sleep(0))
        loop.close()


async def _answer(b: Behaviour, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while head := await reader.readuntil(b"\r\n\r\n"):
            fields = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:] if line)
            if head.startswith(b"GET /v1/models "):
                models = json.dumps({"object": "list", "data": [{"id": "tiny", "object": "model"}]}).encode()
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(models), models))
                continue
            body = json.loads(await reader.readexactly(int(fields[b"content-length"])))
            b.bodies.append(body)
            b.in_flight += 1
            b.most_in_flight = max(b.most_in_flight, b.in_flight)
            await _stream(b, body, writer, head.startswith(b"POST /v1/completions "))
            b.in_flight -= 1
    except (asyncio.IncompleteReadError, ConnectionError):
        pass
    finally:
        writer.close()


async def _stream(b: Behaviour, body: dict, writer: asyncio.StreamWriter, openai: bool) -> None:
    async def send(data: str) -> None:
        event = f"data: {data}\n\n".encode()
        writer.write(f"{len(event):x}\r\n".encode() + event + b"\r\n")
        await writer.drain()

    kind = "text/event-stream" if b.status == 200 else "text/plain"
    head = f"HTTP/1.1 {b.status} {responses[b.status]}\r\nContent-Type: {kind}\r\nTransfer-Encoding: chunked\r\n"
    head += f"Content-Encoding: {b.encoding}\r\n\r\n" if b.encoding else "\r\n"
    if b.hang:
        await asyncio.sleep(3600)
    writer.write(head.encode())
    if b.status == 200:
        total = (body["max_tokens"] if openai else body["sampling_params"]["max_new_tokens"]) - b.lose
        for seen in range(b.chunk, total + b.chunk, b.chunk):
            await asyncio.sleep(b.ttft if seen == b.chunk else b.itl)
            prompt = body["prompt"] if openai else body["text"]
            meta = {"completion_tokens": min(seen, total), "prompt_tokens": len(prompt.split())}
            event = {"text": b.text, "meta_info": meta | {"finish_reason": b.finish_reason}}
            if openai:
                choices = [{"index": 0, "text": "x" * b.chunk}]
                usage = meta | {"total_tokens": sum(meta.values())}
                event = {"id": "0", "object": "text_completion", "choices": choices, "usage": usage}
            if b.error_event:
                await send(json.dumps({"error": {"message": "transfer failed"}}))
            await send("not json" if b.garbage else json.dumps(event, ensure_ascii=False))  # as SGLang's orjson
        if not b.silent:
            await send("[DONE]")
    else:
        await send("no worker is ready")
    writer.write(b"0\r\n\r\n")
    await writer.drain()
