"""The tutorial's servers as a person runs them: genuine SGLang from a terminal, asked, checked, loaded, Ctrl-C.

The model is a tiny one; SmolLM2 is served in test_served_pair.py.
"""

import json

import commandline
import httpx
import pytest
from terminal import CTRL_C, Terminal

from pdtrim_deploy.cli.interrupt import RESUME
from pdtrim_deploy.manifests.dashboard import names
from pdtrim_deploy.serving.ports import free_ports
from pdtrim_deploy.serving.process import session_members

pytestmark = [
    pytest.mark.serve,
    pytest.mark.model,
    pytest.mark.timeout(900),
    pytest.mark.xdist_group("tiny bundle"),
    pytest.mark.usefixtures("no_shared_pairs"),
]


def run(capsys, *args):
    """The command's JSON."""
    code, out, err = commandline.run(capsys, *args)
    assert not code, err
    return json.loads(out)


def test_the_tutorials_servers(more_kv_only_bundle, tmp_path, capsys):
    (port,) = free_ports(1)
    terminal = Terminal("serve", more_kv_only_bundle.path, "--port", port, "--json", "--log-dir", tmp_path)
    terminal.read_until(r'"workers": .*\n', 600)
    served = json.loads(next(line for line in terminal.text.splitlines() if line.startswith("{")))
    url, pids = served["url"], [worker["pid"] for worker in served["workers"]]
    assert url.endswith(f":{port}")
    body = {"model": served["model"], "prompt": "The river", "max_tokens": 16, "ignore_eos": True}
    response = httpx.post(f"{url}/v1/completions", json=body, timeout=120).json()
    # Not its text: most tokens of this random model are none of its tokenizer's, and read as nothing.
    assert response["usage"]["completion_tokens"] == 16
    assert response["choices"][0]["finish_reason"] == "length"
    assert run(capsys, "fidelity", more_kv_only_bundle.path, url, "--json")["passed"]
    assert run(capsys, "loadtest", url, "--requests", 4, "--concurrency", 2, "--json")["failed"] == 0
    exported = "".join(
        httpx.get(at, timeout=120).text
        for at in (served["router"]["metrics"], *(worker["metrics"] for worker in served["workers"]))
    )
    assert [name for name in names() if name not in exported] == []
    terminal.press(CTRL_C)
    assert terminal.ended() == 130, terminal.text
    assert terminal.text.rstrip().endswith(f"stopped by Ctrl-C; {RESUME['serve']}")
    assert "Traceback" not in terminal.text
    assert [session_members(pid) for pid in pids] == [[], []]
    logs = {name: (tmp_path / f"{name}.log").read_text() for name in ("prefill-0", "decode-0")}
    assert [name for name, log in logs.items() if "Gracefully exiting" not in log] == [], "did not act on SIGTERM"
