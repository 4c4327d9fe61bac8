"""What stands behind the URL of `fidelity` may be anything, or nothing: one sentence each."""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from pdtrim_deploy.errors import ServingError, UserError
from pdtrim_deploy.evaluation.fidelity.cases import Group
from pdtrim_deploy.evaluation.fidelity.client import Served, ask

ALONE = Group("g", "in turn", ((1, 2, 3),))
PAIR = Group("g", "one batch", ((1,), (2, 3)))
GOOD = {"text": "x", "meta_info": {"output_token_logprobs": [[-0.5, 7, None], [-1, 8, None]], "cached_tokens": 1}}


@contextmanager
def serve(body: bytes, status: int = 200, after: float = 0.0) -> Iterator[str]:
    """Base URL of a server that answers every POST like that."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            time.sleep(after)
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def test_answers_of_a_pair() -> None:
    with serve(json.dumps(GOOD).encode()) as url:
        assert ask(url, ALONE, 2, 60) == [Served((1, 2, 3), (7, 8), (-0.5, -1.0), 1)]
    with serve(json.dumps([GOOD, GOOD]).encode()) as url:
        assert [answer.prompt for answer in ask(url, PAIR, 2, 60)] == [(1,), (2, 3)]


@pytest.mark.parametrize(
    "body",
    ["<html>", "[]", "null", '{"text": "x"}', '{"text": "x", "meta_info": {"output_token_logprobs": []}}'],
)
@pytest.mark.parametrize("group", [ALONE, PAIR], ids=["alone", "batch"])
def test_an_answer_of_another_server(group: Group, body: str) -> None:
    with serve(body.encode()) as url, pytest.raises(UserError, match="holds no token logprobs as SGLang gives them; g"):
        ask(url, group, 2, 60)


def test_a_request_that_fails_is_told_in_the_servers_words() -> None:
    with serve(b"no worker is ready", status=503) as url, pytest.raises(UserError, match="503: no worker is ready"):
        ask(url, ALONE, 2, 60)


def test_nobody_answers() -> None:
    with serve(b"") as url:
        pass
    with pytest.raises(ServingError, match=rf"^{url} does not answer \(.*\); give the URL of a router that runs$"):
        ask(url, ALONE, 2, 60)
    with serve(b"", after=30) as url, pytest.raises(ServingError, match=r"within 0\.2 s; look into .* --deadline$"):
        ask(url, ALONE, 2, 0.2)


def test_what_is_no_url() -> None:
    with pytest.raises(UserError, match="is not a URL such as"):
        ask("http://[::1", ALONE, 2, 60)
