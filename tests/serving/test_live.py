"""Genuine SGLang workers and router on loopback, with a tiny random model: started, asked, broken, stopped."""

import json
import os
import re
import signal
import subprocess
import urllib.request

import pytest

from pdtrim_deploy.errors import ServingError
from pdtrim_deploy.serving import Cluster, ClusterSpec, ServeEnvironment, WorkerOptions
from pdtrim_deploy.serving.client import post_json
from pdtrim_deploy.serving.metrics import scrape, total
from pdtrim_deploy.serving.process import session_members

pytestmark = [pytest.mark.serve, pytest.mark.timeout(900)]


def test_a_real_pair_serves_until_one_of_its_schedulers_is_killed(tiny_dir, tmp_path):
    model = tiny_dir("LlamaForCausalLM")
    spec = ClusterSpec.on_loopback(model, model, options=WorkerOptions(device="cpu", max_total_tokens=2048))
    with Cluster(spec, ServeEnvironment.find(), tmp_path / "logs") as cluster:
        pids = [process.pid for process in cluster._processes.values()]
        chat = {
            "model": "pdtrim",
            "messages": [{"role": "user", "content": "hello"}],
            "max_tokens": 4,
            "ignore_eos": True,
        }
        answer = post_json(f"{cluster.url}/v1/chat/completions", chat, 60.0)
        assert answer["usage"]["completion_tokens"] == 4
        text = post_json(f"{cluster.url}/v1/completions", {"model": "pdtrim", "prompt": "a b", "max_tokens": 3}, 60.0)
        assert text["choices"][0]["finish_reason"]
        counted = {"stream": True, "stream_options": {"include_usage": True}}
        assert streamed(f"{cluster.url}/v1/chat/completions", chat | counted) == 4

        decode = next(worker for worker in cluster.workers if worker.spec.stage == "decode")
        assert total(scrape(decode.metrics_url), "sglang:generation_tokens_total") >= 8

        # SGLang starts its scheduler before its detokenizer; it renames them where the kernel lets it.
        children = [pid for pid in session_members(decode.pid) if re.search(b"spawn_main|scheduler", cmdline(pid))]
        os.kill(min(children), signal.SIGKILL)
        with pytest.raises(ServingError, match=r"^decode-0 .*\n(?s:.)*last lines of .*decode-0\.log"):
            cluster.wait()
    assert all(session_members(pid) == [] for pid in pids)


def streamed(url, body):
    """Tokens of a streamed answer that ended as it should."""
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60.0) as answer:
        events = [line[6:].decode().strip() for line in answer if line.startswith(b"data: ")]
    assert events.pop() == "[DONE]"
    return json.loads(events[-1])["usage"]["completion_tokens"]


def cmdline(pid):
    with open(f"/proc/{pid}/cmdline", "rb") as file:
        return file.read()


def test_the_serve_environment_has_our_plugin_and_a_stub_that_says_so():
    program = """
from importlib.metadata import entry_points
assert [e.value for e in entry_points(group="sglang.srt.plugins") if e.name == "pdtrim"] == ["pdtrim_sglang:register"]
import sgl_kernel
if sgl_kernel.__version__.endswith("stub"):
    try:
        sgl_kernel.silu_and_mul(1)
    except RuntimeError as error:
        assert "CPU stub" in str(error) and "silu_and_mul" in str(error), error
    else:
        raise SystemExit("the stub computed something")
"""
    subprocess.run([ServeEnvironment.find().python, "-c", program], check=True, timeout=120)
