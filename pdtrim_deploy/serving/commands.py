"""The command lines and environments of SGLang 0.5.23 workers and sglang-router 0.3.2."""

from __future__ import annotations

import getpass
import json
import os
import secrets
import tempfile
from collections.abc import Mapping
from pathlib import Path

from pdtrim_deploy.serving.engines import engine_limits
from pdtrim_deploy.serving.gpu_defaults import (
    NO_WINDOW_POOL,
    WINDOW_POOL_SHARE,
    attention_arguments,
    graph_arguments,
    pool_arguments,
    precision_environment,
    state_environment,
    window_flags,
)
from pdtrim_deploy.serving.memory import FRACTION, static_fraction
from pdtrim_deploy.serving.ports import HOST
from pdtrim_deploy.serving.ranks import attention_groups
from pdtrim_deploy.serving.spec import ClusterSpec, WorkerSpec
from pdtrim_deploy.worker.config import ARGUMENT, WorkerConfig
from pdtrim_deploy.worker.transport import TransportOptions

# `python -m sglang_router.launch_router`, without the tracing that it takes from sglang where it finds one: that
# import costs 17 s of CPU and 0.9 GB (torch and transformers) and is used by no option here.
ROUTER = "import sys; sys.modules['sglang'] = None; from sglang_router.launch_router import main; main()"
# The model class that runs an engine, in the package where SGLang looks for model classes first.
ENGINE_PACKAGE, ENGINE_MODEL = "pdtrim_sglang.models", "PDTrimStageForCausalLM"
# How the router takes a worker out that is dead or stuck. Its circuit breaker would take out others: ten requests that
# fail by themselves shut two workers out for a minute, for all clients. Until the health checks have noticed, retries
# reach another worker. SGLang's /health waits for a batch of the scheduler, and says no after 20 s.
ROUTER_HEALTH = (
    "--disable-circuit-breaker",
    *("--health-check-interval-secs", "10", "--health-failure-threshold", "2", "--health-check-timeout-secs", "30"),
)
# Of ours, and would lead the other environment's Python to our packages.
FOREIGN = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")


def worker_command(python: Path, worker: WorkerSpec, secret: Path | None = None) -> list[str]:
    """`python -m sglang.launch_server ...`; `secret` is the cluster's (write_secret)."""
    options = worker.options
    arguments: dict[str, object] = {
        "--model-path": worker.model_path,
        "--served-model-name": options.served_model_name,
        "--host": HOST,
        "--port": worker.port,
        "--page-size": options.page_tokens,
        "--dtype": options.dtype,
        "--device": options.device,
    }
    if worker.role != "unified":
        arguments["--disaggregation-mode"] = worker.role
        arguments["--disaggregation-transfer-backend"] = options.transfer_backend
    limits = {
        "--max-total-tokens": options.pool_tokens,
        "--max-running-requests": options.requests,
        "--chunked-prefill-size": options.chunked_prefill_size,
        "--weight-version": options.plan_digest,
    }
    arguments |= engine_limits(worker.engine) | {name: limit for name, limit in limits.items() if limit is not None}
    override = _override(worker, secret)
    if override:
        arguments[ARGUMENT] = json.dumps(override)
    if worker.bootstrap_port is not None:
        arguments["--disaggregation-bootstrap-port"] = worker.bootstrap_port
    arguments |= pool_arguments(options.pool_dtype)
    flags = ["--enable-metrics"] if options.enable_metrics else []
    flags += window_flags(worker.role, options.sparse) or _cpu_window_flags(worker)
    if options.device == "cpu":
        arguments[FRACTION] = static_fraction(worker)
        if not options.sinks:
            arguments["--attention-backend"] = "torch_native"
        flags += ["--disable-overlap-schedule", "--sleep-on-idle"]
        if attention_groups(options.arguments(worker.role)) > 1:  # SGLang has that exchange on GPUs alone
            flags.append("--no-enable-tp-lm-head-all-to-all")
        if (ranks := options.tp(worker.role)) > 1:
            arguments["--tp-size"] = ranks
        if worker.role == "decode" and not options.sparse:  # the default backs up KV through CUDA streams
            arguments["--disaggregation-decode-retraction-backup"] = "none"
    else:
        if (placement := worker.placement) is not None:
            arguments |= {"--base-gpu-id": placement.first, "--tp-size": placement.ranks}
            if placement.memory_fraction is not None:
                arguments[FRACTION] = placement.memory_fraction
        arguments |= attention_arguments(worker.role, options.sparse, options.dtype)
        arguments |= graph_arguments(worker.role, options.tail)
        if worker.executor == "tensorrt" and worker.role == "prefill":  # SGLang's breaks would end its capture midway
            flags.append("--disable-prefill-cuda-graph")
    pairs = [str(part) for pair in arguments.items() for part in pair]
    return [str(python), "-m", "sglang.launch_server", *pairs, *flags, *options.arguments(worker.role)]


def _cpu_window_flags(worker: WorkerSpec) -> list[str]:
    """No pool of windows on a CPU, unless a caller's argument says how large it is.

    It is smaller than the KV pool (by a ratio, or for the windows of all requests), and with pages of one token decode
    admits prompts up to the smaller (disaggregation/decode.py, `_uses_swa_tail_prealloc`); one window ends it.
    """
    options = worker.options
    sized = any(argument.split("=")[0] == WINDOW_POOL_SHARE for argument in options.arguments(worker.role))
    return [NO_WINDOW_POOL] if options.device == "cpu" and not sized else []


def _override(worker: WorkerSpec, secret: Path | None) -> dict[str, object]:
    """What the worker is told through config.json: how KV travels, and its engine; without KV transfer nothing."""
    if worker.role == "unified":
        return {}
    options = worker.options
    config = WorkerConfig(
        secret_file=None if secret is None else str(secret),
        transport=TransportOptions.model_validate(worker.transport),
        decode_pool=options.split_pool if worker.role == "decode" else None,
        send_by_layer=options.send_by_layer,
        engine=worker.engine.as_config() if worker.engine is not None else None,
    )
    return config.override() | ({"architectures": [ENGINE_MODEL]} if worker.engine is not None else {})


def write_secret(folder: Path) -> Path:
    """A new secret that only this user can read: 32 random bytes as hex."""
    path = folder / "secret"
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(secrets.token_hex(32))
    return path


def worker_environment(python: Path, worker: WorkerSpec, workers: int, temporary: Path) -> dict[str, str]:
    """The worker's whole environment; `temporary` receives its temporary files."""
    # Only our plugin, only loopback, no hub: the model is on disk.
    chosen = {"SGLANG_PLUGINS": "pdtrim", "SGLANG_HOST_IP": HOST, "HF_HUB_OFFLINE": "1"}
    if worker.engine is not None:
        chosen["SGLANG_EXTERNAL_MODEL_PACKAGE"] = ENGINE_PACKAGE
    if worker.options.device == "cpu":
        cores = sorted(os.sched_getaffinity(0))
        threads = worker.options.threads or max(1, len(cores) // workers)
        # Waiting threads sleep: spinning ones starve the other workers of a small machine tenfold.
        chosen |= {
            "SGLANG_USE_CPU_ENGINE": "1",
            "OMP_NUM_THREADS": str(threads),
            "OPENBLAS_NUM_THREADS": "1",  # numpy would start its threads when it is imported: then nothing may fork
            "OMP_WAIT_POLICY": "PASSIVE",
            "GOMP_SPINCOUNT": "0",
        }
        chosen |= state_environment(worker.options.conv_dtype)
        if (ranks := worker.options.tp(worker.role)) > 1:
            chosen["SGLANG_NCCL_SO_PATH"] = os.devnull  # NCCL needs GPUs; without it SGLang's ranks speak by gloo
            chosen["SGLANG_CPU_OMP_THREADS_BIND"] = "|".join([",".join(map(str, cores))] * ranks)
    else:
        chosen |= precision_environment(worker.options.dtype, worker.options.conv_dtype)
    return _base(python, os.environ, temporary) | chosen


def router_command(python: Path, cluster: ClusterSpec) -> list[str]:
    """The router's program over all workers of the cluster."""
    router = cluster.router
    command = [str(python), "-c", ROUTER]
    if cluster.unified:
        command += ["--worker-urls", *(worker.url for worker in cluster.unified)]
    else:
        command += ["--pd-disaggregation"]
    for worker in cluster.prefill:
        command += ["--prefill", worker.url, str(worker.bootstrap_port)]
    for worker in cluster.decode:
        command += ["--decode", worker.url]
    arguments: dict[str, object] = {
        "--host": HOST,
        "--port": router.port,
        "--prometheus-host": HOST,
        "--prometheus-port": router.metrics_port,
        "--policy": router.policy,
        "--request-timeout-secs": router.request_timeout_s,
        "--worker-startup-timeout-secs": int(cluster.start_timeout_s),
        "--worker-startup-check-interval": 1,
        "--shutdown-grace-period-secs": 2,
    }
    return [*command, *(str(part) for pair in arguments.items() for part in pair), *ROUTER_HEALTH, *router.extra_args]


def router_environment(python: Path, temporary: Path) -> dict[str, str]:
    """The router's whole environment."""
    return _base(python, os.environ, temporary)


def _base(python: Path, ours: Mapping[str, str], temporary: Path) -> dict[str, str]:
    inherited = {name: value for name, value in ours.items() if name not in FOREIGN}
    path = f"{python.parent}{os.pathsep}{inherited.get('PATH', os.defpath)}"  # its ninja, not ours
    compiled = Path(tempfile.gettempdir()) / f"torchinductor_{_user()}"  # torch's default: kept between runs
    return (
        {"TORCHINDUCTOR_CACHE_DIR": str(compiled)}
        | inherited
        | {
            "PATH": path,
            "TMPDIR": str(temporary),
            "PYTHONUNBUFFERED": "1",
        }
    )


def _user() -> str:
    """Its name, or its number where it has none, as in a container with a user id of its own."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # the second from Python 3.13 on
        return str(os.getuid())
