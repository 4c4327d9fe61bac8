"""The tutorial's servers as a person runs them: genuine SGLang from a terminal, asked, checked, loaded, Ctrl-C."""

import json
import subprocess
import sys

import httpx
import pytest
from terminal import CTRL_C, Terminal

from pdtrim_deploy.cli.interrupt import RESUME
from pdtrim_deploy.manifests.dashboard import names
from pdtrim_deploy.serving.ports import free_ports
from pdtrim_deploy.serving.process import session_members

pytestmark = [pytest.mark.serve, pytest.mark.model, pytest.mark.timeout(900)]


def run(*args):
    command = [sys.executable, "-m", "pdtrim_deploy", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)


def test_the_tutorials_servers(bundle, tmp_path):
    (port,) = free_ports(1)
    terminal = Terminal("serve", bundle.path, "--port", port, "--json", "--log-dir", tmp_path)
    terminal.read_until(r'"workers": .*\n', 600)
    said = json.loads(next(line for line in terminal.text.splitlines() if line.startswith("{")))
    url, pids = said["url"], [worker["pid"] for worker in said["workers"]]
    assert url.endswith(f":{port}")
    body = {"model": said["model"], "prompt": "The river", "max_tokens": 16}
    assert httpx.post(f"{url}/v1/completions", json=body, timeout=120).json()["choices"][0]["text"]
    checked = run("fidelity", bundle.path, url, "--json")
    assert checked.returncode == 0, checked.stderr
    assert json.loads(checked.stdout)["passed"]
    loaded = run("loadtest", url, "--requests", 4, "--concurrency", 2, "--json")
    assert loaded.returncode == 0, loaded.stderr
    assert json.loads(loaded.stdout)["failed"] == 0
    exported = "".join(
        httpx.get(at, timeout=60).text
        for at in (said["router"]["metrics"], *(worker["metrics"] for worker in said["workers"]))
    )
    assert [name for name in names() if name not in exported] == []
    terminal.press(CTRL_C)
    assert terminal.ended() == 130, terminal.text
    assert terminal.text.rstrip().endswith(f"stopped by Ctrl-C; {RESUME['serve']}")
    assert "Traceback" not in terminal.text
    assert [session_members(pid) for pid in pids] == [[], []]
