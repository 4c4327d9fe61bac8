"""Command lines, ports, finding SGLang, metrics: the parts that need no process."""

import contextlib
import json
import os
import socket
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from bare_bundle import make_bundle

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.plan import PDPlan
from pdtrim_deploy.serving import ClusterSpec, Executors, ServeEnvironment, WorkerOptions, commands, environment
from pdtrim_deploy.serving.metrics import Sample, parse, total
from pdtrim_deploy.serving.one_model import require_kind
from pdtrim_deploy.serving.ports import free_ports, require_free
from pdtrim_deploy.serving.transports import require_transport
from pdtrim_deploy.worker.decode_pool import SplitPool

PYTHON = Path("/serve/bin/python")


def spec(gpus=3, **options):
    model = Path("model")
    return ClusterSpec.on_loopback(model, model, prefill=2, decode=1, options=WorkerOptions(**options), gpus=gpus)


def value(command, option):
    assert command.count(option) == 1
    return command[command.index(option) + 1]


def test_ports_are_free_and_all_different():
    cluster = spec(device="cpu")
    ports = [w.port for w in cluster.workers] + [w.bootstrap_port for w in cluster.prefill]
    ports += [cluster.router.port, cluster.router.metrics_port]
    assert len(set(ports)) == len(ports) == 7
    for port in ports:
        socket.create_server(("127.0.0.1", port)).close()  # as servers do: beside connections that are long closed


def test_all_workers_are_given_one_secret_that_others_cannot_read(tmp_path):
    secret = commands.write_secret(tmp_path)
    assert secret.stat().st_mode & 0o777 == 0o600
    assert len(bytes.fromhex(secret.read_text())) == 32
    with pytest.raises(FileExistsError):
        commands.write_secret(tmp_path)
    for worker in spec(device="cpu").workers:
        command = commands.worker_command(PYTHON, worker, secret)
        assert json.loads(value(command, "--json-model-override-args")) == {"pdtrim_secret_file": str(secret)}
        assert secret.read_text() not in " ".join(command)


def test_a_taken_port_is_refused_by_name():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(UserError, match=f"--port {port}: another program"):
            ClusterSpec.on_loopback(Path("m"), Path("m"), port=port)


def test_free_ports_passes_over_taken_ones():
    some = frozenset(free_ports(50))
    assert not some & set(free_ports(200, taken=some))


@pytest.mark.parametrize("stage", ["prefill", "decode"])
def test_a_cpu_worker_sleeps_when_idle_and_listens_on_loopback_only(stage):
    worker = next(w for w in spec(device="cpu").workers if w.role == stage)
    command = commands.worker_command(PYTHON, worker)
    assert command[:3] == [str(PYTHON), "-m", "sglang.launch_server"]
    assert value(command, "--host") == "127.0.0.1"
    assert value(command, "--disaggregation-mode") == stage
    assert value(command, "--disaggregation-transfer-backend") == "pdtrim_tcp"
    assert value(command, "--attention-backend") == "torch_native"
    assert "--sleep-on-idle" in command
    assert Path(value(command, "--model-path")).is_absolute()  # the worker runs in its log folder
    assert ("--disaggregation-bootstrap-port" in command) == (stage == "prefill")
    assert ("--disaggregation-decode-retraction-backup" in command) == (stage == "decode")


def test_ranks_on_a_cpu_speak_without_nccl_and_share_its_cores(tmp_path):
    """SGLang gives each rank a NUMA node of its own unless it is given cores, and ends where there are too few."""
    prefill, *_, decode = spec(device="cpu", tp_decode=3).workers
    alone, ranks = (commands.worker_environment(PYTHON, worker, 3, tmp_path) for worker in (prefill, decode))
    assert "--tp-size" not in commands.worker_command(PYTHON, prefill)
    assert value(commands.worker_command(PYTHON, decode), "--tp-size") == "3"
    assert ranks["SGLANG_NCCL_SO_PATH"] == os.devnull
    assert len(ranks["SGLANG_CPU_OMP_THREADS_BIND"].split("|")) == 3
    assert not {"SGLANG_NCCL_SO_PATH", "SGLANG_CPU_OMP_THREADS_BIND"} & alone.keys()


def test_gpu_workers_get_none_of_the_cpu_options_and_gpus_of_their_own():
    commands_of = [
        commands.worker_command(PYTHON, w) for w in spec(gpus=6, device="cuda", tp_prefill=2, tp_decode=2).workers
    ]
    cpu = {"--sleep-on-idle", "--disable-overlap-schedule", "--max-total-tokens", "--max-running-requests"}
    for command in commands_of:
        assert not ({"--attention-backend", "--mem-fraction-static", "--disable-cuda-graph"} | cpu) & set(command)
        assert value(command, "--page-size") == "64"
        assert value(command, "--tp-size") == "2"
    assert [value(command, "--base-gpu-id") for command in commands_of] == ["0", "2", "4"]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("sized", [(), ("--swa-full-tokens-ratio", "1"), ("--swa-full-tokens-ratio=0.5",)])
def test_windows_have_no_pool_of_their_own_where_layers_are_cut_nor_on_a_cpu_unless_sized(device, sparse, sized):
    """With pages of one token, as on a CPU, SGLang's decode takes no prompts longer than a pool of windows."""
    for worker in spec(device=device, sparse=sparse, extra_args=sized).workers:
        none = (sparse and worker.role == "decode") or (device == "cpu" and not sized)
        assert commands.worker_command(PYTHON, worker).count("--disable-hybrid-swa-memory") == none


def test_a_pool_of_windows_sized_for_one_stage_is_that_stages():
    for worker in spec(device="cpu", prefill_args=("--swa-full-tokens-ratio", "1")).workers:
        command = commands.worker_command(PYTHON, worker)
        assert ("--disable-hybrid-swa-memory" in command) == (worker.role == "decode")


def test_where_attention_has_sinks_sglang_chooses_its_attention_on_a_cpu():
    """It refuses torch_native by name, and takes it where it chooses without AMX."""
    for worker in spec(device="cpu", sinks=True).workers:
        assert "--attention-backend" not in commands.worker_command(PYTHON, worker)


def test_limits_that_were_chosen_are_those_of_gpu_workers_too():
    worker = spec(device="cuda", page_size=16, max_total_tokens=5000, max_running_requests=7).workers[0]
    command = commands.worker_command(PYTHON, worker)
    assert value(command, "--page-size") == "16"
    assert value(command, "--max-total-tokens") == "5000"
    assert value(command, "--max-running-requests") == "7"


def test_a_pair_beside_others_leaves_them_memory_on_a_gpu():
    model, options = Path("model"), WorkerOptions.beside_others(device="cuda")
    for worker in ClusterSpec.on_loopback(model, model, options=options, gpus=1).workers:
        command = commands.worker_command(PYTHON, worker)
        assert value(command, "--max-total-tokens") == "8192"
        assert value(command, "--max-running-requests") == "16"
        assert float(value(command, "--mem-fraction-static")) < 0.8


def test_on_a_gpu_decode_of_a_sparse_plan_alone_gets_triton_and_keeps_its_graphs():
    for worker in spec(device="cuda", sparse=True).workers:
        command = commands.worker_command(PYTHON, worker)
        assert "--disable-cuda-graph" not in command
        assert ("--attention-backend" in command) == (worker.role == "decode")
        if worker.role == "decode":
            assert value(command, "--attention-backend") == "triton"


@pytest.mark.parametrize(("dtype", "precision"), [("float32", "ieee"), ("bfloat16", None)])
def test_triton_multiplies_float32_in_float32(tmp_path, dtype, precision):
    for worker in spec(device="cuda", dtype=dtype).workers:
        assert commands.worker_environment(PYTHON, worker, 3, tmp_path).get("TRITON_F32_DEFAULT") == precision


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize(("dtype", "conv_dtype", "columns"), [
    ("float32", "float32", "float32"), ("float16", "float16", "float16"), ("bfloat16", "bfloat16", None),
    ("float16", "bfloat16", None), ("float32", None, None),
])  # fmt: skip
def test_convolutions_are_in_the_plans_dtype(tmp_path, device, dtype, conv_dtype, columns):
    for worker in spec(device=device, dtype=dtype, conv_dtype=conv_dtype).workers:
        variables = commands.worker_environment(PYTHON, worker, 3, tmp_path)
        assert variables.get("SGLANG_MAMBA_CONV_DTYPE") == columns


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_sizes_of_pools_are_for_decode_alone(device):
    for worker in spec(device=device, sparse=True, split_pool=SplitPool(isl=40, osl=8)).workers:
        command = commands.worker_command(PYTHON, worker)
        if worker.role == "decode":
            assert json.loads(value(command, "--json-model-override-args")) == {
                "pdtrim_decode_pool": {"isl": 40, "osl": 8}
            }
            # the plugin chooses what can back up pools of different sizes
            assert "--disaggregation-decode-retraction-backup" not in command
        else:
            assert "--json-model-override-args" not in command


def test_extra_arguments_come_last_and_so_win():
    worker = spec(device="cpu", extra_args=("--page-size", "32")).workers[0]
    assert commands.worker_command(PYTHON, worker)[-2:] == ["--page-size", "32"]


def test_arguments_of_a_stage_come_after_those_of_both_and_reach_no_other():
    arguments = {"extra_args": ("--a", "1"), "prefill_args": ("--b", "2"), "decode_args": ("--c", "3")}
    for worker in spec(device="cpu", **arguments).workers:
        stage_args = ["--b", "2"] if worker.role == "prefill" else ["--c", "3"]
        assert commands.worker_command(PYTHON, worker)[-4:] == ["--a", "1", *stage_args]


DP_ATTENTION = [
    "--enable-dp-attention --dp-size 2", "--dp-size=2 --enable-dp-attention", "--attn-dp-size 2", "--attn-dp-size=2",
    "--attention-data-parallel-size 2", "--enable-dp-attention --attn-dp-size 2",
]  # fmt: skip


@pytest.mark.parametrize(
    ("device", "words", "gathered"),
    [
        *(("cpu", words, ["decode"]) for words in DP_ATTENTION),
        ("cuda", DP_ATTENTION[0], []),
        ("cpu", "--attn-dp-size 1", []),
        ("cpu", "--enable-dp-attention-local-control-broadcast --dp-size 1", []),
    ],
)
def test_on_a_cpu_ranks_of_dp_attention_gather_logits(device, words, gathered):
    workers = spec(device=device, decode_args=tuple(words.split())).workers
    flag = "--no-enable-tp-lm-head-all-to-all"
    assert [worker.role for worker in workers if flag in commands.worker_command(PYTHON, worker)] == gathered


def test_the_environment_is_the_workers_own(monkeypatch, tmp_path):
    monkeypatch.setenv("PYTHONPATH", "/build/only")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    worker = spec(device="cpu").workers[0]
    env = commands.worker_environment(PYTHON, worker, 3, tmp_path)
    assert "PYTHONPATH" not in env
    assert env["PATH"].split(os.pathsep)[0] == "/serve/bin"
    assert (env["OMP_NUM_THREADS"], env["OMP_WAIT_POLICY"], env["SGLANG_PLUGINS"]) == ("2", "PASSIVE", "pdtrim")
    assert env["TMPDIR"] == str(tmp_path)
    fixed = replace(worker, options=replace(worker.options, threads=5))
    assert commands.worker_environment(PYTHON, fixed, 3, tmp_path)["OMP_NUM_THREADS"] == "5"
    assert env["OPENBLAS_NUM_THREADS"] == "1"


def test_a_port_of_roots_is_not_said_to_be_taken(monkeypatch):
    def bind(self, address):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(socket.socket, "bind", bind)
    with pytest.raises(UserError, match="--port 80: this user may not listen on it; choose 1024 or more"):
        require_free(80, "--port")


def test_a_user_without_a_name_may_serve(monkeypatch, tmp_path):
    """A container may choose any user id; then there is no name in /etc/passwd."""
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME", "TORCHINDUCTOR_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 2**31 - 7)
    compiled = commands.router_environment(PYTHON, tmp_path)["TORCHINDUCTOR_CACHE_DIR"]
    assert compiled.endswith(f"torchinductor_{2**31 - 7}")


def test_the_router_knows_every_worker_once():
    cluster = spec(device="cpu")
    command = commands.router_command(PYTHON, cluster)
    assert "sglang_router.launch_router" in value(command, "-c")
    for worker in cluster.prefill:
        assert command[command.index(worker.url) - 1] == "--prefill"
        assert command[command.index(worker.url) + 1] == str(worker.bootstrap_port)
    assert value(command, "--decode") == cluster.decode[0].url
    assert value(command, "--host") == value(command, "--prometheus-host") == "127.0.0.1"
    assert "--disable-circuit-breaker" in command


def test_no_worker_of_a_stage_is_refused():
    with pytest.raises(UserError, match="at least one worker"):
        ClusterSpec.on_loopback(Path("m"), Path("m"), decode=0)


def test_sglang_is_found_where_make_setup_puts_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(environment, "REPO", tmp_path / "elsewhere")
    monkeypatch.setattr(environment.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"make setup.*--serve-python"):
        ServeEnvironment.find()
    python = tmp_path / ".venv" / "serve" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.touch()
    assert ServeEnvironment.find() == ServeEnvironment(python)
    assert ServeEnvironment.find(Path(sys.executable)).python == Path(sys.executable)
    with pytest.raises(UserError, match="no such program"):
        ServeEnvironment.find(tmp_path / "python9")


def test_our_own_python_serves_when_it_has_sglang(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(environment, "REPO", tmp_path)
    monkeypatch.setattr(environment.importlib.util, "find_spec", lambda name: object())
    assert ServeEnvironment.find().python == Path(sys.executable)


def test_metrics_become_typed_samples():
    text = (
        "# TYPE kv_bytes histogram\n"
        'kv_bytes_bucket{le="10.0",stage="p"} 1.0\nkv_bytes_bucket{le="+Inf",stage="p"} 2.0\n'
        'kv_bytes_sum{stage="p"} 20.5\nkv_bytes_count{stage="p"} 2.0\n'
        '# TYPE asked counter\nasked_total{code="200"} 3\nasked_total{code="500"} 1\n'
    )
    samples = parse(text)
    assert samples["kv_bytes_sum"] == [Sample({"stage": "p"}, 20.5)]
    assert [s.labels["le"] for s in samples["kv_bytes_bucket"]] == ["10.0", "+Inf"]
    assert (total(samples, "asked_total"), total(samples, "asked_total", code="500")) == (4.0, 1.0)
    assert total(samples, "absent") == 0.0


def test_transport_options_travel_beside_the_secret(tmp_path):
    spec = ClusterSpec.on_loopback(tmp_path, tmp_path)
    worker = replace(spec.workers[0], transport={"stall_seconds": 3})
    command = commands.worker_command(Path("python"), worker, tmp_path / "secret")
    override = json.loads(command[command.index("--json-model-override-args") + 1])
    assert override == {"pdtrim_secret_file": str(tmp_path / "secret"), "pdtrim_transport": {"stall_seconds": 3}}


@pytest.mark.parametrize(
    ("backend", "options", "says"),
    [
        ("pdtrim_mooncake", {}, "without authentication"),
        ("pdtrim_mooncake", {"accept_unauthenticated": True}, "needs the Python package mooncake-transfer-engine"),
        ("pdtrim_nixl", {}, r"needs the Python package nixl==.* -m pip install --no-deps nixl=="),
    ],
)
def test_a_transport_that_cannot_be_used_is_refused_before_a_worker_starts(tmp_path, backend, options, says):
    lacks = tmp_path / "python"
    lacks.write_text("#!/bin/sh\nexit 1\n")
    lacks.chmod(0o755)
    with pytest.raises(UserError, match=says):
        require_transport(ServeEnvironment(lacks), backend, options)
    require_transport(ServeEnvironment(lacks), "pdtrim_tcp", {})


@pytest.mark.parametrize(("backend", "device"), [("pdtrim_tcp", "cuda"), ("pdtrim_nixl", "cpu")])
def test_slots_that_no_worker_could_have_are_refused_before_one_starts(tmp_path, backend, device):
    with pytest.raises(UserError, match=f"slots=device needs workers on GPUs .* not {backend} on {device}"):
        require_transport(ServeEnvironment(tmp_path / "python"), backend, {"slots": "device"}, device)


@pytest.mark.parametrize("pool", ["native", "fp8_e4m3"])
def test_both_stages_get_the_plans_kv_pool(pool):
    for worker in spec(device="cuda", pool_dtype=pool).workers:
        command = commands.worker_command(PYTHON, worker)
        assert ("--kv-cache-dtype" in command) == (pool != "native")
        if pool != "native":
            assert value(command, "--kv-cache-dtype") == pool


def one_model(workers=2, gpus=4, **options):
    return ClusterSpec.of_one_model(Path("model"), workers=workers, options=WorkerOptions(**options), gpus=gpus)


def test_workers_of_one_model_are_plain_sglang_behind_a_router_of_plain_workers(tmp_path):
    cluster = one_model(device="cpu", extra_args=("--log-level", "info"), plan_digest="d" * 64)
    assert [worker.name for worker in cluster.workers] == ["unified-0", "unified-1"]
    for worker in cluster.workers:
        command = commands.worker_command(PYTHON, worker, tmp_path / "secret")
        assert not [word for word in command if "disaggregation" in word or word == "--json-model-override-args"]
        assert value(command, "--weight-version") == "d" * 64
        assert command[-2:] == ["--log-level", "info"]
    router = commands.router_command(PYTHON, cluster)
    first = router.index("--worker-urls") + 1
    assert router[first : first + 2] == [worker.url for worker in cluster.workers]
    assert not {"--pd-disaggregation", "--prefill", "--decode"} & set(router)


def test_workers_of_one_model_are_placed_as_others():
    cluster = one_model(device="cuda", tp_prefill=2, tp_decode=2)
    assert [worker.placement.gpus for worker in cluster.workers] == [range(2), range(2, 4)]
    with pytest.raises(UserError, match="2 workers of 2, 2 ranks need 4 GPUs"):
        one_model(device="cuda", tp_prefill=2, tp_decode=2, gpus=3)
    with pytest.raises(UserError, match="--workers 0: at least one"):
        one_model(workers=0, device="cpu")


@pytest.mark.parametrize(
    ("unified", "chosen", "says"),
    [
        (False, {"workers": 2}, "--workers 2: .* is a pair; say --prefill and --decode instead"),
        (True, {"stages": (2, 1)}, r"leave out --prefill and --decode \(say --workers\)"),
        (True, {"executors": Executors("onnxruntime")}, "leave out executors"),
        (True, {"transport": {"port": 4}}, "leave out --transport"),
        (True, {"options": {"transfer_backend": "nixl", "send_by_layer": True}}, "--transport, --send-by-layer"),
        (True, {"options": {"decode_args": ("--x",)}}, r"--prefill-args and --decode-args \(say --worker-args\)"),
        (True, {"options": {"tp_decode": 2}}, "--tp-prefill 1 --tp-decode 2: .* give the same number"),
        (True, {"workers": 3, "options": {"tp_decode": 2, "tp_prefill": 2}}, None),
    ],
)
def test_a_bundle_takes_the_options_of_its_kind(unified, chosen, says, tmp_path):
    bundle = make_bundle(tmp_path / "b")
    whole = PDPlan.uncut(bundle.plan.model, bundle.plan.prefill, bundle.plan.decode).with_parts(unified=unified)
    question = {"workers": 1, "stages": (1, 1), "options": {}, "executors": Executors(), "transport": {}} | chosen
    question["options"] = WorkerOptions(device="cpu", **question["options"])
    refused = pytest.raises(UserError, match=says) if says else contextlib.nullcontext()
    with refused:
        require_kind(replace(bundle, plan=whole), *question.values())
