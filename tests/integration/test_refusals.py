"""A stock pair of a tiny model: it serves; it is broken; decode workers that would answer with wrong text are refused.

One prefill worker serves all tests. Each puts a decode worker of its own beside it, so that any of them can run alone.
"""

import json
import os
import signal
import urllib.request
from dataclasses import replace

import pytest

from pdtrim_deploy.errors import ServingError
from pdtrim_deploy.models import open_checkpoint
from pdtrim_deploy.models.surgery import write_stage
from pdtrim_deploy.plan import Drop, Keep, KVSend, ModelShape, PDPlan
from pdtrim_deploy.serving.client import post_json
from pdtrim_deploy.serving.metrics import scrape, total
from pdtrim_deploy.serving.process import session_members

pytestmark = [pytest.mark.serve, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def stages(tiny_llama_dir, tmp_path_factory, real_cache):
    """`stages(name, dropped)`: plan and decode checkpoint of the tiny model, without `dropped`."""
    folder = tmp_path_factory.mktemp("tiny")
    checkpoint = open_checkpoint(tiny_llama_dir, real_cache)

    def write(name, dropped, sparse=False):
        shape = checkpoint.shape("float32")
        decode = tuple(Drop() if block in dropped else Keep() for block in range(shape.num_blocks))
        send = KVSend(mode="sparse", n_first=2, n_last=3) if sparse else KVSend()
        kept = shape.num_blocks - len(dropped)
        plan = PDPlan(model=shape, prefill=(Keep(),) * shape.num_blocks, decode=decode, kv=(send,) * kept)
        data = plan.model_dump(mode="json")
        write_stage(checkpoint, folder / name, plan.layers("decode"), "float32", data)
        return plan, folder / name

    return write


@pytest.fixture(scope="module")
def cluster(tiny_llama_dir, serving):
    """The stock pair: checkpoints without a plan, all layers and all rows."""
    with serving(tiny_llama_dir, tiny_llama_dir, dtype="float32", max_total_tokens=2048) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def stock(cluster):
    """The specification of the pair's own decode worker."""
    (decode,) = cluster.spec.decode
    return decode


def replace_decode(cluster, spec):
    """Restart decode as `spec` says; whatever was left of the one before is gone then."""
    pid = cluster.workers[1].pid
    try:
        cluster.restart("decode-0", spec)
    finally:
        assert session_members(pid) == []


def unplanned(layers):
    """The plan by which the plugin serves a stock checkpoint of so many of the tiny model's layers."""
    kind = {"architecture": "unplanned", "fingerprint": "unplanned"}
    return PDPlan.dense(ModelShape(num_blocks=layers, num_kv_heads=2, head_dim=16, kv_dtype="float32", **kind))


def test_a_real_pair_serves_until_one_of_its_schedulers_is_killed(cluster, stock):
    if cluster.spec.decode != (stock,):  # another test has replaced it
        replace_decode(cluster, stock)
    chat = {
        "model": "pdtrim",
        "messages": [{"role": "user", "content": "hello"}],
        "max_tokens": 4,
        "ignore_eos": True,
    }
    answer = post_json(f"{cluster.url}/v1/chat/completions", chat, 120.0)
    assert answer["usage"]["completion_tokens"] == 4
    text = post_json(f"{cluster.url}/v1/completions", {"model": "pdtrim", "prompt": "a b", "max_tokens": 3}, 120.0)
    assert text["choices"][0]["finish_reason"]
    counted = {"stream": True, "stream_options": {"include_usage": True}}
    assert streamed(f"{cluster.url}/v1/chat/completions", chat | counted) == 4

    decode = next(worker for worker in cluster.workers if worker.spec.role == "decode")
    assert total(scrape(decode.metrics_url), "sglang:generation_tokens_total") >= 8

    processes = sorted(session_members(decode.pid))
    assert len(processes) == 3, "forked on a CPU: launcher, scheduler, detokenizer, without multiprocessing's helpers"
    os.kill(processes[1], signal.SIGKILL)
    with pytest.raises(ServingError, match=r"^decode-0 .*\n(?s:.)*last lines of .*decode-0\.log"):
        cluster.wait()


def streamed(url, body):
    """Tokens of a streamed answer that ended as it should."""
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120.0) as answer:
        events = [line[6:].decode().strip() for line in answer if line.startswith(b"data: ")]
    assert events.pop() == "[DONE]"
    return json.loads(events[-1])["usage"]["completion_tokens"]


def test_workers_of_different_plans_are_refused_naming_both(stages, cluster, stock):
    plan, decode = stages("other", {2}, sparse=True)
    with pytest.raises(ServingError) as refusal:
        replace_decode(cluster, replace(stock, model_path=decode))
    assert f"prefill serves plan {unplanned(6).digest}" in str(refusal.value)
    assert f"decode serves plan {plan.digest}" in str(refusal.value)
    assert "start both workers from one bundle" in str(refusal.value)


def test_stock_checkpoints_of_different_depth_are_refused(stages, cluster, stock):
    """Stock SGLang answers such a pair with wrong text, or hangs."""
    _, decode = stages("stock", {1, 3})
    config = json.loads((decode / "config.json").read_text())
    del config["pdtrim"]
    (decode / "config.json").write_text(json.dumps(config))
    refusal = rf"prefill serves plan {unplanned(6).digest}, decode serves plan {unplanned(4).digest}"
    with pytest.raises(ServingError, match=f"plans differ: {refusal}"):
        replace_decode(cluster, replace(stock, model_path=decode))


def test_a_worker_with_another_kv_dtype_says_so_and_dies(stages, cluster, stock):
    _, decode = stages("dtype", set())
    options = replace(stock.options, dtype="bfloat16")
    with pytest.raises(ServingError, match="plan was made for a float32 KV cache"):
        replace_decode(cluster, replace(stock, model_path=decode, options=options))


def test_an_end_leaves_no_process_behind(cluster):
    pids = [process.pid for process in cluster._processes.values()]
    assert any(session_members(pid) for pid in pids)
    cluster.stop()
    assert all(session_members(pid) == [] for pid in pids)
