"""Run by SGLang's Python: imports SGLang once, then forks a worker for each request that its socket brings.

The socket is descriptor argv[1]. A request is a line of JSON: `{"arguments", "environment", "folder", "log"}`, what
`python -m sglang.launch_server` gets. Answers are lines `{"pid"}`, and `{"pid", "code"}` when a worker has ended (code:
negative for a signal). All die with this program, which dies when the socket closes.
"""

from __future__ import annotations

import ctypes
import json
import os
import runpy
import select
import signal
import socket
import sys
import tempfile
from typing import Any

from waiting import wait_asleep

PR_SET_PDEATHSIG = 1
MODULE = "sglang.launch_server"


def main() -> None:
    channel = socket.socket(fileno=int(sys.argv[1]))
    import sglang.launch_server
    import sglang.srt.entrypoints.http_server
    import sglang.srt.managers.detokenizer_manager
    import sglang.srt.managers.scheduler  # noqa: F401

    assert len(os.listdir("/proc/self/task")) == 1, "a fork is safe with one thread alone"
    request = requested(channel)
    if request is not None:
        become(request)


def requested(channel: socket.socket) -> dict[str, Any] | None:
    """In a worker: its request. In this program: None, at the end."""
    prctl, parent, rest = ctypes.CDLL(None).prctl, os.getpid(), b""
    while True:
        if select.select([channel], [], [], 0.1)[0]:
            data = channel.recv(1 << 16)
            if not data:
                return None
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                if not (pid := os.fork()):
                    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
                    channel.close()
                    if os.getppid() != parent:
                        os._exit(1)
                    return json.loads(line)
                answer(channel, pid=pid)
        for pid, status in ended():
            answer(channel, pid=pid, code=os.waitstatus_to_exitcode(status))


def ended() -> list[tuple[int, int]]:
    """Process and wait status of each child that has ended."""
    children = []
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return children
        if not pid:
            return children
        children.append((pid, status))


def answer(channel: socket.socket, **fields: int) -> None:
    channel.sendall(json.dumps(fields).encode() + b"\n")


def become(request: dict[str, Any]) -> None:
    """The worker of this request, as if it had been started by itself."""
    os.setsid()
    for path, flags, descriptors in (
        (os.devnull, os.O_RDONLY, (0,)),
        (request["log"], os.O_WRONLY | os.O_APPEND, (1, 2)),
    ):
        file = os.open(path, flags)
        for descriptor in descriptors:
            os.dup2(file, descriptor)
        os.close(file)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    tempfile.tempdir = None  # of the new environment
    wait_asleep(groups="--enable-dp-attention" in request["arguments"])
    if "--lora-paths" in request["arguments"]:
        from unpinned import leave_pinning_out

        leave_pinning_out()
    if has_linear_attention(request["arguments"]):
        import linear_attention_kernels

        linear_attention_kernels.compute_by_torch()
    if "--speculative-algorithm" in request["arguments"]:
        from speculation_kernels import compute_by_torch

        compute_by_torch()
    if has_copied_heads(request["arguments"]):
        from unpadded import leave_padding_out

        leave_padding_out()
    del sys.modules[MODULE]
    sys.argv = [MODULE, *request["arguments"]]
    runpy.run_module(MODULE, run_name="__main__", alter_sys=True)


def has_linear_attention(arguments: list[str]) -> bool:
    """Whether the worker's model has layers with gated delta nets."""
    return "linear_attention" in (config(arguments).get("layer_types") or ())


def has_copied_heads(arguments: list[str]) -> bool:
    """Whether the worker has more ranks than its model has KV heads."""
    ranks = int(value(arguments, "--tp-size")) if "--tp-size" in arguments else 1
    return ranks > config(arguments).get("num_key_value_heads", ranks)


def config(arguments: list[str]) -> dict[str, Any]:
    """Of the worker's model."""
    with open(os.path.join(value(arguments, "--model-path"), "config.json")) as file:
        return json.load(file)


def value(arguments: list[str], option: str) -> str:
    return arguments[arguments.index(option) + 1]


if __name__ == "__main__":
    main()
