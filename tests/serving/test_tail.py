"""How prefill workers are started whose plan has a tail: without CUDA graphs of prefill, unless a caller says more."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from bare_bundle import make_bundle

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.manifests import BundleAt, Options, Served, compose, kubernetes
from pdtrim_deploy.manifests.options import worker_arguments
from pdtrim_deploy.plan import STAGES, PDPlan
from pdtrim_deploy.plan.blocks import BODY, KVOnly
from pdtrim_deploy.serving import ClusterSpec, ServeEnvironment, WorkerOptions, cluster_of
from pdtrim_deploy.serving.commands import worker_command
from pdtrim_deploy.serving.memory import memory_of

GRAPHS = "--cuda-graph-backend-prefill"


def tailed(folder: Path, tail: int = 8):
    bundle = make_bundle(folder)
    plan = bundle.plan.with_parts(prefill=(*bundle.plan.prefill[:-1], KVOnly()), kv_only_tail=tail)
    (bundle.prefill_dir / BODY).mkdir()
    (bundle.prefill_dir / BODY / "config.json").write_text(json.dumps({"num_hidden_layers": 1}))
    return replace(bundle, plan=plan)


def commands(bundle, **chosen) -> dict[str, list[str]]:
    options = WorkerOptions(dtype="float32", **chosen)
    cluster = cluster_of(bundle, options=options, environment=ServeEnvironment(Path("python")), gpus=2)
    return {worker.role: worker_command(Path("python"), worker) for worker in cluster.spec.workers}


def test_gpu_workers_of_prefill_capture_nothing(tmp_path):
    words = commands(tailed(tmp_path / "b"), device="cuda")
    assert words["prefill"][words["prefill"].index(GRAPHS) + 1] == "disabled"
    assert GRAPHS not in words["decode"]


def test_a_caller_s_argument_comes_last(tmp_path):
    words = commands(tailed(tmp_path / "b"), device="cuda", prefill_args=(GRAPHS, "full"))["prefill"]
    assert [words[at + 1] for at, word in enumerate(words) if word == GRAPHS] == ["disabled", "full"]


def test_no_pair_starts_without_the_weights_before_the_tail(tmp_path):
    bundle = tailed(tmp_path / "b")
    (bundle.prefill_dir / BODY / "config.json").unlink()
    with pytest.raises(UserError, match=f"prefill/{BODY}: missing.*build the bundle again"):
        commands(bundle, device="cpu")


def test_no_pair_starts_on_an_older_bundle_whose_body_is_a_whole_model(tmp_path):
    bundle = tailed(tmp_path / "b")
    layers = len(bundle.plan.prefill_layers)
    (bundle.prefill_dir / BODY / "config.json").write_text(json.dumps({"num_hidden_layers": layers}))
    sentence = f"prefill/{BODY}: has {layers} layers, and the plan 1 KV-only blocks.*; build the bundle again"
    with pytest.raises(UserError, match=sentence):
        commands(bundle, device="cpu")


def test_nothing_changes_on_a_cpu_or_without_a_tail(tmp_path):
    assert not any(GRAPHS in words for words in commands(tailed(tmp_path / "b"), device="cpu").values())
    assert not any(GRAPHS in words for words in commands(make_bundle(tmp_path / "c"), device="cuda").values())


def rendered(plan: PDPlan, **chosen) -> dict[str, list[str]]:
    return {stage: worker_arguments(Served.of("m", plan), Options(**chosen), stage) for stage in STAGES}


def test_manifests_say_the_same(tmp_path):
    plan = tailed(tmp_path / "b").plan
    words = rendered(plan, prefill_args=(GRAPHS, "full"))
    assert [words["prefill"][at + 1] for at, word in enumerate(words["prefill"]) if word == GRAPHS] == [
        "disabled", "full",
    ]  # fmt: skip
    assert GRAPHS not in words["decode"]
    assert not any(GRAPHS in words for words in rendered(make_bundle(tmp_path / "c").plan).values())
    options = Options(bundle=BundleAt("host", "/srv/b"))
    assert GRAPHS in compose(Served.of("m", plan), options)["services"]["prefill-0"]["command"]
    assert GRAPHS in str(kubernetes(Served.of("m", plan), options)["prefill.yaml"])


def test_a_cpu_worker_has_the_weights_of_both_checkpoints(tmp_path, tiny_llama_dir):
    (tmp_path / "config.json").write_text((tiny_llama_dir / "config.json").read_text())
    options = WorkerOptions(device="cpu", dtype="float32")
    prefill, _ = ClusterSpec.on_loopback(tmp_path, tmp_path, options=options).workers
    before = memory_of(prefill)
    (tmp_path / BODY).mkdir()
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / BODY / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    after = memory_of(prefill)
    assert before is not None
    assert after is not None
    assert before.weights < after.weights < 2 * before.weights
