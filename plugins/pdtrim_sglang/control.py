"""SGLang's ZMQ control channel, closed to programs without the cluster's secret (CURVE), with bounded messages.

Every worker of a cluster has the one key pair that the secret gives. Its public half is told to nobody: who can speak
to a server at all knows the secret, and what is said is encrypted. Plans are compared later, in `Register`.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Iterable

import zmq
from zmq.utils import z85
from zmq.utils.monitor import recv_monitor_message

from pdtrim_sglang.secret import derive

logger = logging.getLogger("sglang.srt.pdtrim.control")
MOST_MESSAGE_BYTES = 16 << 10  # of one frame; libzmq drops a connection that announces more, before it allocates
REFUSED = zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_AUTH
REBIND_SECONDS, QUIET_SECONDS = 5.0, 10.0


def protect(server: zmq.Socket, contexts: Iterable[zmq.Context], secret: bytes) -> None:
    """Bind `server` anew, in the same place, with the cluster's key; sockets that `contexts` make later speak to such.

    Without a secret messages are bounded, and nothing else.

    Raises:
        zmq.ZMQError: the port was taken meanwhile.

    """
    place = server.last_endpoint
    server.unbind(place)
    server.setsockopt(zmq.MAXMSGSIZE, MOST_MESSAGE_BYTES)
    if secret:
        private = z85.encode(derive(secret, b"control channel"))
        public = zmq.curve_public(private)
        for option, value in ((zmq.CURVE_SECRETKEY, private), (zmq.CURVE_PUBLICKEY, public), (zmq.CURVE_SERVER, True)):
            server.setsockopt(option, value)
        for context in contexts:
            for option, key in (
                (zmq.CURVE_SECRETKEY, private),
                (zmq.CURVE_PUBLICKEY, public),
                (zmq.CURVE_SERVERKEY, public),
            ):
                context.setsockopt(option, key)
        _report_refusals(server)
    _bind(server, place)


def _bind(server: zmq.Socket, place: bytes) -> None:
    """The I/O thread gives a port back a moment after `unbind`."""
    deadline = time.monotonic() + REBIND_SECONDS
    while True:
        try:
            server.bind(place)
            return
        except zmq.ZMQError as error:
            if error.errno != zmq.EADDRINUSE or time.monotonic() > deadline:
                raise
        time.sleep(0.01)


def _report_refusals(server: zmq.Socket) -> None:
    monitor = server.get_monitor_socket(REFUSED | zmq.EVENT_MONITOR_STOPPED)

    def watch() -> None:
        silent_until = 0.0
        with monitor, contextlib.suppress(zmq.ContextTerminated):
            while recv_monitor_message(monitor)["event"] != zmq.EVENT_MONITOR_STOPPED:
                if time.monotonic() > silent_until:
                    silent_until = time.monotonic() + QUIET_SECONDS
                    logger.error("pdtrim: refused a peer that does not have this cluster's secret")

    threading.Thread(target=watch, daemon=True).start()
