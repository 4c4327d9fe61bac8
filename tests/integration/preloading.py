"""Workers of this session's clusters as forks of one program that has imported SGLang already (preloaded.py).

To import torch, transformers and SGLang takes a worker 13 s of CPU, and this suite starts some fifty. They are genuine
workers all the same. Those of the commands `serve` and `demo`, in test_tutorial and test_demo, start as users' do.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pdtrim_deploy.local.job import dies_with
from pdtrim_deploy.serving.process import ServerProcess

_READ_LATER = {
    "TMPDIR", "PYTEST_CURRENT_TEST", "SGLANG_EXTERNAL_MODEL_PACKAGE", "SGLANG_CPU_OMP_THREADS_BIND",
    "SGLANG_NCCL_SO_PATH", "SGLANG_MAMBA_CONV_DTYPE",
}  # fmt: skip
PRELOADED = Path(__file__).with_name("preloaded.py")


class Preloading:
    """Starts the program with its first worker; `start` takes the place of ServerProcess."""

    def __init__(self, log: Path) -> None:
        self._log, self._server = log, None  # type: tuple[Path, _Server | None]

    def start(self, name: str, command: Sequence[str], env: Mapping[str, str], log: Path) -> ServerProcess:
        """A fork, where the command starts a worker that imports what the others do; of one OpenMP thread."""
        if list(command[1:3]) != ["-m", "sglang.launch_server"]:
            return ServerProcess(name, command, env, log)
        env = dict(env) | {"OMP_NUM_THREADS": "1"}  # under more, imports start threads, which a fork would lose
        if self._server is None or self._server.died():
            self._server = _Server(command[0], env, self._log)
        if self._server.imported_under != _read_by_imports(env):
            return ServerProcess(name, command, env, log)
        return _Forked(name, command, env, log, self._server)

    def close(self) -> None:
        """End the program, and workers that are left."""
        if self._server is not None:
            self._server.close()


def _read_by_imports(env: Mapping[str, str]) -> dict[str, str]:
    """Settings that may count while torch, Triton and SGLang are imported; a worker with others starts by itself."""
    return {name: value for name, value in env.items() if name not in _READ_LATER}


class _Server:
    def __init__(self, python: str, env: Mapping[str, str], log: Path) -> None:
        self.imported_under, self._codes, self._pids, self._rest = _read_by_imports(env), {}, [], b""
        self._log, (self._channel, peer) = log, socket.socketpair()
        with peer, log.open("ab") as output:
            self._popen = subprocess.Popen(
                [python, str(PRELOADED), str(peer.fileno())], env=dict(env) | {"TMPDIR": "/tmp"}, cwd=log.parent,
                stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, pass_fds=[peer.fileno()],
                preexec_fn=dies_with(os.getpid()),  # noqa: PLW1509 (one system call, no lock)
            )  # fmt: skip

    def died(self) -> bool:
        return self._popen.poll() is not None

    def fork(self, **request: Any) -> int:
        with contextlib.suppress(ConnectionError):  # it has ended, as `died` will find
            self._channel.sendall(json.dumps(request).encode() + b"\n")
        while not self._pids:
            self._read(1.0)
            assert not self.died(), f"the program that forks workers has ended; see {self._log}"
        return self._pids.pop(0)

    def code(self, pid: int) -> int | None:
        self._read(0.0)
        return self._codes.get(pid, -9 if self.died() else None)

    def close(self) -> None:
        self._channel.close()
        self._popen.wait(120)

    def _read(self, timeout: float) -> None:
        self._channel.settimeout(timeout)
        try:
            data = self._channel.recv(1 << 16)
        except (BlockingIOError, TimeoutError):
            return
        except ConnectionError:
            data = b""
        if not data:
            self._popen.wait(120)  # it has ended
        *lines, self._rest = (self._rest + data).split(b"\n")
        for fields in map(json.loads, lines):
            if "code" in fields:
                self._codes[fields["pid"]] = fields["code"]
            else:
                self._pids.append(fields["pid"])


class _Child:
    """What ServerProcess uses of a Popen."""

    def __init__(self, pid: int, code: Callable[[], int | None]) -> None:
        self.pid, self.poll = pid, code

    def terminate(self) -> None:
        os.kill(self.pid, 15)

    def wait(self, timeout: float | None = None) -> int:
        deadline = None if timeout is None else time.monotonic() + timeout
        while (code := self.poll()) is None:
            if deadline is not None and time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("worker", timeout)
            time.sleep(0.05)
        return code


class _Forked(ServerProcess):
    def __init__(self, name: str, command: Sequence[str], env: Mapping[str, str], log: Path, server: _Server) -> None:
        self.name, self.command, self.log = name, list(command), log
        log.write_text(f"$ {' '.join(self.command)}\n")
        request = {"arguments": self.command[3:], "environment": dict(env), "folder": str(log.parent), "log": str(log)}
        self.pid = server.fork(**request)
        self._popen = _Child(self.pid, lambda: server.code(self.pid))
