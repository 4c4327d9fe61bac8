"""A chat endpoint on loopback that gives recorded answers, late ones first."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@contextlib.contextmanager
def answering(
    answer: Callable[[str], str | None],
    bodies: list[dict] | None = None,
    context: int | None = None,
    weight_version: str = "default",
) -> Iterator[str]:
    """Its URL; `answer(content)` of the last message gives the text, None an HTTP 400.

    A token is a word of the prompt, a letter of an answer; `context` is what the model's card says,
    `weight_version` what every answer does.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._send(
                200, {"object": "list", "data": [{"id": "recorded", "object": "model", "max_model_len": context}]}
            )

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            if bodies is not None:
                bodies.append(body)
            text = answer(body["messages"][-1]["content"])
            time.sleep(0.2 / (1 + len(text or "")))  # short texts come last
            if text is None:
                self._send(400, {"error": {"message": "refused"}})
                return
            choice = {"index": 0, "message": {"role": "assistant", "content": text}}
            choice["finish_reason"] = "length" if text.endswith("...") else "stop"
            prompt = sum(len(message["content"].split()) for message in body["messages"])
            usage = {"prompt_tokens": prompt, "completion_tokens": len(text), "total_tokens": prompt + len(text)}
            reply = {"id": "0", "object": "chat.completion", "created": 0, "model": "recorded"}
            self._send(
                200, reply | {"choices": [choice], "usage": usage, "metadata": {"weight_version": weight_version}}
            )

        def _send(self, status: int, content: dict) -> None:
            data = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            """Nothing on stderr."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
