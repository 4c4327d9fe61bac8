"""Whatever a server does, the client gets an answer or an OSError."""

import socket
import threading

import pytest

from pdtrim_deploy.serving import probe
from pdtrim_deploy.serving.client import explain, get


@pytest.fixture
def server():
    """server(bytes): the URL of a server that answers one request with them and hangs up."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve(response):
            connection, _ = listener.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(response)

        def start(response):
            threading.Thread(target=serve, args=(response,), daemon=True).start()
            return f"http://127.0.0.1:{listener.getsockname()[1]}"

        yield start


def test_a_refusal_whose_words_break_off_is_explained(server):
    cut = b"HTTP/1.1 500 No\r\nTransfer-Encoding: chunked\r\n\r\n20\r\nabc"
    with pytest.raises(OSError, match="500") as refused:
        get(server(cut), 60)
    assert explain(refused.value) == "HTTP 500: "
    assert probe.complaint(server(cut), 60) == "HTTP 500: "


@pytest.mark.parametrize("response", [b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{}", b"SSH-2.0-x\r\n", b""])
def test_an_answer_that_breaks_off_is_an_os_error(server, response):
    """As when a worker dies while it answers."""
    with pytest.raises(OSError, match=r"no whole HTTP answer|closed connection"):
        get(server(response), 60)
    assert not probe.is_healthy(server(response), 60)
    assert probe.complaint(server(response), 60)
