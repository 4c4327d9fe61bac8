"""Programs of models run to their end or are no pass, within limits."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from pdtrim_deploy.evaluation.generated.execution import passes


@pytest.mark.parametrize(
    ("program", "right"),
    [
        ("assert 1 + 1 == 2", True),
        ("print('x' * 5000)", True),
        ("assert 1 + 1 == 3", False),
        ("def broken(:", False),
        ("import sys\nsys.exit(0)", False),
        ("import os\nos._exit(0)", False),
        ("import os\nos.kill(os.getpid(), 9)", False),
        ("x = bytearray(2 << 30)", False),
        ("open('big', 'wb').write(bytes(1 << 25))", False),
        ("try:\n    x = bytearray(2 << 30)\nexcept MemoryError:\n    pass", True),
    ],
    ids=["right", "prints", "wrong", "no Python", "exit", "early end", "killed", "memory", "file", "memory, caught"],
)
def test_only_a_program_that_reaches_its_end_passes(program: str, right: bool) -> None:
    assert passes(program, wall_s=120.0) is right


def test_time_is_limited() -> None:
    assert not passes("while True:\n    pass", cpu_s=1)
    assert not passes("import time\ntime.sleep(60)", wall_s=1.0)


@pytest.mark.skipif(sys.platform != "linux", reason="namespaces are Linux's")
def test_it_runs_apart(tmp_path: Path) -> None:
    assert passes("import os\nassert os.listdir('.') and os.environ['HOME'] == os.getcwd()")
    assert passes("import os\nassert not {'PATH', 'USER', 'HTTP_PROXY'} & set(os.environ)")
    names = "import socket\nassert [name for _, name in socket.if_nameindex()] == ['lo']"
    connects = "socket.create_connection(('127.0.0.1', PORT), 2)"
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
        unreachable = f"import socket\ntry:\n    {connects}\nexcept OSError:\n    pass\nelse:\n    raise SystemExit(1)"
        assert passes(unreachable.replace("PORT", port))
    assert passes(names)


@pytest.mark.skipif(sys.platform != "linux", reason="orphans are adopted on Linux")
@pytest.mark.parametrize(("rest", "right"), [("pass", True), ("time.sleep(600)", False)], ids=["ends", "is ended"])
def test_what_it_starts_in_another_session_ends_with_it(tmp_path: Path, rest: str, right: bool) -> None:
    noted = tmp_path / "pid"
    starts = "child = subprocess.Popen(['/bin/sleep', '600'], start_new_session=True)"
    notes = f"open({str(noted)!r}, 'w').write(str(child.pid))"
    for wall_s in (120.0,) if right else (5.0, 30.0, 90.0):  # a busy machine may begin late
        assert passes(f"import subprocess, time\n{starts}\n{notes}\n{rest}", wall_s=wall_s) is right
        if noted.exists():
            break
    assert not Path("/proc", noted.read_text()).exists()
