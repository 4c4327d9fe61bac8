"""One host with GPUs: a Compose file with one service per worker and the router."""

from __future__ import annotations

from typing import Any

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.manifests.options import (
    BOOTSTRAP_PORT,
    BUNDLE_MOUNT,
    GRACE_S,
    HTTP_PORT,
    ROUTER_ARGUMENTS,
    ROUTER_PORT,
    SECRET_KEY,
    Options,
    Served,
    worker_arguments,
    worker_environment,
)
from pdtrim_deploy.plan import STAGES, Stage

HEALTHY = "import urllib.request; urllib.request.urlopen('http://127.0.0.1:{port}{path}', timeout=25)"


def compose(served: Served, options: Options) -> dict[str, Any]:
    """`docker compose` file: each worker gets the next GPUs of the host, only the router is published.

    Raises:
        UserError: the bundle is not in a folder of the host, or an extended resource was given.

    """
    if options.bundle.kind != "host":
        raise UserError("a Compose file mounts the bundle from a folder: give --bundle-from host:/FOLDER")
    if options.rdma:
        raise UserError(
            f"--rdma {options.rdma} is a resource of Kubernetes; leave it out with --to compose, whose file you give "
            "the host's devices in by `devices:`"
        )
    services: dict[str, Any] = {}
    first_gpu = 0
    router = list(ROUTER_ARGUMENTS)
    for stage in STAGES:
        for index in range(options.replicas(stage)):
            name = f"{stage}-{index}"
            services[name] = _worker(served, options, stage, first_gpu)
            first_gpu += options.gpus(stage)
            router += [f"--{stage}", f"http://{name}:{HTTP_PORT}"]
            router += [str(BOOTSTRAP_PORT)] if stage == "prefill" else []
    services["router"] = {
        **_basics(options),
        "command": router,
        "environment": {"HOME": "/tmp"},
        "ports": [f"127.0.0.1:{ROUTER_PORT}:{ROUTER_PORT}"],
        "depends_on": {name: {"condition": "service_healthy"} for name in services},
        "healthcheck": _check(ROUTER_PORT, "/readiness", "30s"),
    }
    return {"name": options.name, "services": services, "secrets": {SECRET_KEY: {"file": f"./{SECRET_KEY}-secret"}}}


def _worker(served: Served, options: Options, stage: Stage, first_gpu: int) -> dict[str, Any]:
    ids = [str(first_gpu + n) for n in range(options.gpus(stage))]
    device = {"driver": "nvidia", "device_ids": ids, "capabilities": ["gpu"]}
    return {
        **_basics(options),
        "command": [_literal(word) for word in worker_arguments(served, options, stage)],
        "environment": worker_environment(served),
        "volumes": [
            {"type": "bind", "source": _literal(options.bundle.place), "target": BUNDLE_MOUNT, "read_only": True}
        ],
        "secrets": [SECRET_KEY],
        "shm_size": "8gb",
        "deploy": {"resources": {"reservations": {"devices": [device]}}},
        "healthcheck": _check(HTTP_PORT, "/health", "30m"),
        "labels": {"pdtrim.plan-digest": served.plan_digest, "pdtrim.stage": stage},
    }


def _literal(word: str) -> str:
    """A word without variables."""
    return word.replace("$", "$$")


def _basics(options: Options) -> dict[str, Any]:
    return {
        "image": options.image,
        "restart": "unless-stopped",
        "stop_grace_period": f"{GRACE_S}s",
        "read_only": True,
        "tmpfs": ["/tmp:exec"],  # Docker mounts it noexec, and what Triton compiles under HOME is loaded from there
        "cap_drop": ["ALL"],
        "security_opt": ["no-new-privileges:true"],
    }


def _check(port: int, path: str, start: str) -> dict[str, Any]:
    command = ["CMD", "python3", "-c", HEALTHY.format(port=port, path=path)]
    return {"test": command, "interval": "30s", "timeout": "30s", "retries": 3, "start_period": start}
