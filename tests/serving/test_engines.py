"""The executor of a stage: found in the bundle, passed to the worker, or refused in one sentence."""

import json
from dataclasses import replace
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from commandline import run

from pdtrim_deploy.bundle import Bundle, Manifest
from pdtrim_deploy.bundle.engine import TargetResult
from pdtrim_deploy.cli import options
from pdtrim_deploy.errors import UserError
from pdtrim_deploy.plan import ModelShape, PDPlan
from pdtrim_deploy.serving import ClusterSpec, Engine, Executors, WorkerOptions, commands
from pdtrim_deploy.serving.engines import find_engine, require_batches

PYTHON = Path("/serve/bin/python")


def make(folder, kv_dtype="float32", failures=None, **engines):
    """A bundle as far as engines are concerned; `onnx_prefill="float16"` is an engine in float16."""
    shape = {"architecture": "X", "fingerprint": "f", "num_blocks": 1, "num_kv_heads": 1, "head_dim": 8}
    plan = PDPlan.dense(ModelShape(**shape, kv_dtype=kv_dtype))
    built = {}
    for name, dtype in engines.items():
        target, stage = name.split("_")
        facts = {"target": target, "stage": stage, "status": "built", "dtype": dtype, "plan_digest": plan.digest}
        built[f"engines/{target}/{stage}"] = TargetResult(**facts)
    manifest = Manifest(
        recipe_digest="r", plan_digest=plan.digest, seed=0, versions={}, steps={}, files={}, engines=built,
        failures=failures or {},
    )  # fmt: skip
    return Bundle(folder, plan, None, manifest)


def test_the_engine_of_a_stage_is_found_and_torch_needs_none(tmp_path):
    bundle = make(tmp_path, onnx_prefill="float32", onnx_decode="float32")
    engine = find_engine(bundle, "decode", "onnxruntime", "cpu")
    assert engine == Engine("onnxruntime", "decode", tmp_path / "engines" / "onnx" / "decode")
    assert find_engine(bundle, "decode", "torch", "cuda") is None


@pytest.mark.parametrize(
    ("bundle", "executor", "device", "sentence"),
    [
        ({}, "onnxruntime", "cpu", "no prefill engine for target onnx, the targets built are none; add `onnx:`"),
        ({"failures": {"onnx": "boom"}}, "onnxruntime", "cpu", r"could not be built \(boom\)"),
        ({"onnx_prefill": "float32"}, "onnxruntime", "cuda", "executor onnxruntime runs on cpu, the workers on cuda"),
        ({"onnx_prefill": "float32"}, "tensorrt", "cpu", "executor tensorrt runs on cuda, the workers on cpu"),
        ({"onnx_prefill": "float32"}, "tvm", "cpu", "executor 'tvm' is unknown; use torch, onnxruntime, tensorrt"),
        (
            {"onnx_prefill": "float32", "kv_dtype": "bfloat16"}, "onnxruntime", "cpu",
            "onnxruntime computes in float32, the bundle in bfloat16",
        ),
        ({"onnx_prefill": "float16"}, "onnxruntime", "cpu", "an engine in float16, the bundle is in float32"),
    ],
)  # fmt: skip
def test_what_cannot_run_is_refused_before_anything_starts(tmp_path, bundle, executor, device, sentence):
    with pytest.raises(UserError, match=sentence):
        find_engine(make(tmp_path, **bundle), "prefill", executor, device)


def test_the_worker_is_told_its_model_class_and_engine(tmp_path):
    engine = Engine("onnxruntime", "decode", tmp_path)
    options = WorkerOptions(device="cpu")
    spec = ClusterSpec.on_loopback(Path("m"), Path("m"), options=options, engines={"decode": engine, "prefill": None})
    assert [worker.executor for worker in spec.workers] == ["torch", "onnxruntime"]
    for worker in spec.workers:
        command = commands.worker_command(PYTHON, worker)
        env = commands.worker_environment(PYTHON, worker, 2, tmp_path)
        assert ("--json-model-override-args" in command) == (worker.role == "decode")
        assert env.get("SGLANG_EXTERNAL_MODEL_PACKAGE") == ("pdtrim_sglang.models" if worker.role == "decode" else None)
    override = json.loads(command[command.index("--json-model-override-args") + 1])
    assert override["architectures"] == ["PDTrimStageForCausalLM"]
    assert override["pdtrim_engine"] == {"executor": "onnxruntime", "stage": "decode", "path": str(tmp_path.resolve())}


@pytest.mark.parametrize(
    ("arguments", "chosen"),
    [
        ([], None),
        (["--executor", "onnxruntime"], Executors("onnxruntime", "onnxruntime")),
        (["--prefill-executor", "tensorrt"], Executors("tensorrt", "torch")),
        (["--executor", "onnxruntime", "--decode-executor", "torch"], Executors("onnxruntime", "torch")),
    ],
)
def test_the_options_name_one_executor_or_one_a_stage(arguments, chosen):
    seen = []

    @click.command()
    @options.executors
    def command(executors):
        seen.append(executors)

    assert CliRunner().invoke(command, arguments).exit_code == 0
    assert seen == [chosen]


@pytest.mark.parametrize(
    ("executor", "sentence"),
    [
        ("tvm", "'tvm' is not one of 'torch', 'onnxruntime', 'tensorrt'"),
        ("onnxruntime", "http://127.0.0.1:1 already runs"),
    ],
)
def test_an_unknown_executor_and_one_for_a_running_pair_are_code_2(executor, sentence, capsys):
    code, _, err = run(capsys, "loadtest", "http://127.0.0.1:1", "--executor", executor)
    assert code == 2
    assert sentence in err


@pytest.mark.parametrize("stage", ["prefill", "decode"])
def test_a_tensorrt_worker_gets_no_batch_that_its_engine_cannot_take_and_prefill_no_graphs(tmp_path, stage):
    engine, model = Engine("tensorrt", stage, tmp_path, 1024), Path("m")
    for chosen in (None, 512):
        options = WorkerOptions(device="cuda", chunked_prefill_size=chosen)
        workers = ClusterSpec.on_loopback(model, model, options=options, engines={stage: engine}, gpus=2).workers
        for worker in workers:
            command = commands.worker_command(PYTHON, worker)
            computed = worker.role == stage
            assert ("--disable-prefill-cuda-graph" in command) == (computed and stage == "prefill")
            if computed and stage == "prefill":
                assert command[command.index("--chunked-prefill-size") + 1] == str(chosen or 1024)
            assert ("--max-running-requests" in command) == (computed and stage == "decode")


@pytest.mark.parametrize(
    ("stage", "chunk", "requests", "ranks", "says"),
    [
        ("prefill", 2048, None, 1, "--chunked-prefill-size 2048: the prefill engine takes at most 1024 tokens"),
        ("prefill", -1, None, 1, r"--chunked-prefill-size -1: .* `most_tokens`"),
        ("decode", None, 1025, 1, "--max-running-requests 1025: the decode engine takes at most 1024"),
        ("decode", None, None, 2, "the decode engine computes all heads in one rank, not in 2; use executor torch"),
    ],
)
def test_batches_larger_than_an_engine_are_refused(tmp_path, stage, chunk, requests, ranks, says):
    engine = Engine("tensorrt", stage, tmp_path, 1024)
    with pytest.raises(UserError, match=says):
        require_batches(engine, chunk, requests, ranks)
    require_batches(engine, 1024, 1024, 1)
    require_batches(replace(engine, most_tokens=None), chunk, requests, 1)
    require_batches(None, chunk, requests, ranks)
