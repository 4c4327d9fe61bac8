"""What to render: the bundle's facts and the operator's choices."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.plan import PDPlan, Stage
from pdtrim_deploy.plan.linear_states import StateDtype
from pdtrim_deploy.plan.wire import PoolDtype
from pdtrim_deploy.serving.commands import ROUTER_HEALTH
from pdtrim_deploy.serving.gpu_defaults import (
    PAGE_TOKENS,
    attention_arguments,
    graph_arguments,
    pool_arguments,
    precision_environment,
    window_flags,
)
from pdtrim_deploy.serving.ranks import require_arguments
from pdtrim_deploy.serving.transports import LIBRARIES
from pdtrim_deploy.worker.config import ARGUMENT, WorkerConfig
from pdtrim_deploy.worker.transport import TransportOptions

HTTP_PORT, BOOTSTRAP_PORT, ROUTER_PORT, ROUTER_METRICS_PORT = 30000, 8998, 8000, 29000
BUNDLE_MOUNT = "/bundle"
IMAGE = "pdtrim-serve:0.1.0"
USER_ID = 10001  # as the Dockerfile makes it
GRACE_S = 120  # from a pod's SIGTERM to its SIGKILL: for requests under way
SECRET_FOLDER, SECRET_KEY = "/run/secrets", "kv"  # what makes a worker a member: the operator's, in no file of ours
TCP = "pdtrim_tcp"
GPUS = "nvidia.com/gpu"
QUANTITY = re.compile(r"[1-9]\d{0,14}(\.\d{1,3})?([kMGTPE]|[KMGTPE]i)?")
NAMESPACE = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")


@dataclass(frozen=True)
class BundleAt:
    """Where pods find the bundle: `pvc:CLAIM[/SUBPATH]`, `oci:IMAGE` (Kubernetes' image volumes) or `host:FOLDER`."""

    kind: Literal["pvc", "oci", "host"]
    place: str
    subpath: str = ""

    @classmethod
    def parse(cls, text: str) -> BundleAt:
        """UserError when it is none of these."""
        kind, _, place = text.partition(":")
        if kind == "pvc" and place.split("/")[0]:
            claim, _, subpath = place.partition("/")
            return cls("pvc", claim, subpath)
        if (kind == "oci" and place) or (kind == "host" and place.startswith("/")):
            return cls(kind, place)  # type: ignore[arg-type]
        raise UserError(f"--bundle-from is {text!r}; say pvc:CLAIM[/SUBPATH], oci:IMAGE or host:/FOLDER")

    @property
    def volume(self) -> dict[str, Any]:
        """The pod's volume."""
        if self.kind == "pvc":
            return {"persistentVolumeClaim": {"claimName": self.place, "readOnly": True}}
        if self.kind == "oci":
            return {"image": {"reference": self.place, "pullPolicy": "IfNotPresent"}}
        return {"hostPath": {"path": self.place, "type": "Directory"}}


@dataclass(frozen=True)
class Served:
    """What the manifests must know of a bundle."""

    name: str
    plan_digest: str
    dtype: str
    sparse: bool
    pool_dtype: PoolDtype = "native"
    conv_dtype: StateDtype | None = None
    tail: bool = False

    @classmethod
    def of(cls, name: str, plan: PDPlan) -> Served:
        """`name` is the model's name for clients."""
        sparse = any(send.mode == "sparse" for send in plan.kv)
        model, tail = plan.model, plan.kv_only_tail > 0
        return cls(name, plan.digest, model.kv_dtype, sparse, model.pool_dtype, model.conv_dtype, tail)

    @property
    def plan(self) -> str:
        """The digest as far as a Kubernetes label holds it."""
        return self.plan_digest[:32]


@dataclass(frozen=True)
class Options:
    """The operator's choices; `name` is that of the objects, `tp_prefill` and `tp_decode` the GPUs of one worker.

    Attributes:
        rdma: an extended resource such as `rdma/hca`, one a worker; of use to transports other than tcp.
        transport, transport_options: SGLang's transfer backend, and what it is told (`TransportOptions`).
        monitoring: the namespace whose pods may scrape metrics.
        prefill_args, decode_args: more arguments for the workers of a stage; they win over ours.

    """

    name: str = "pdtrim"
    prefill: int = 1
    decode: int = 1
    tp_prefill: int = 1
    tp_decode: int = 1
    image: str = IMAGE
    bundle: BundleAt = field(default_factory=lambda: BundleAt("pvc", "pdtrim-bundle"))
    rdma: str | None = None
    transport: str = TCP
    transport_options: Mapping[str, object] = field(default_factory=dict)
    page_size: int = PAGE_TOKENS
    memory: str = "64Gi"
    monitoring: str = "monitoring"
    prefill_args: tuple[str, ...] = ()
    decode_args: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z]([a-z0-9-]{0,40}[a-z0-9])?", self.name):
            raise UserError(f"--name is {self.name!r}; give lower-case letters, digits and dashes, at most 42 of them")
        if self.rdma is not None and not re.fullmatch(r"[a-z0-9.-]+/[A-Za-z0-9_.-]+", self.rdma):
            raise UserError(f"--rdma is {self.rdma!r}; give an extended resource such as rdma/hca")
        if self.rdma == GPUS:
            raise UserError(
                f"--rdma is {GPUS}, of which a worker has --tp-prefill or --tp-decode; name the NIC's resource"
            )
        if self.rdma is not None and self.transport == TCP:
            raise UserError(f"--rdma is of no use to --transport {TCP}; valid with it: {', '.join(LIBRARIES)}")
        if self.transport != TCP and not self.transport_options.get("accept_unauthenticated"):
            raise UserError(
                f"--transport {self.transport} lets whoever reaches a pod write into its staging memory; on a network "
                f"of its own say so: --transport-option accept_unauthenticated=true, or use --transport {TCP}"
            )
        if not QUANTITY.fullmatch(self.memory):
            raise UserError(f"--memory is {self.memory!r}; give a Kubernetes quantity such as 64Gi")
        if not NAMESPACE.fullmatch(self.monitoring):
            raise UserError(f"--monitoring is {self.monitoring!r}; give a namespace such as monitoring")
        require_arguments(self.prefill_args, "--prefill-args")
        require_arguments(self.decode_args, "--decode-args")

    def replicas(self, stage: Stage) -> int:
        """Workers of a stage."""
        return self.prefill if stage == "prefill" else self.decode

    def gpus(self, stage: Stage) -> int:
        """Those of a worker of a stage, one a tensor-parallel rank."""
        return self.tp_prefill if stage == "prefill" else self.tp_decode


def worker_arguments(served: Served, options: Options, stage: Stage) -> list[str]:
    """`python3 -m sglang.launch_server ...` for SGLang 0.5.23 on GPUs, without what the platform chooses."""
    rdma: dict[str, object] = {"protocol": "rdma"} if options.rdma and options.transport == "pdtrim_mooncake" else {}
    transport = TransportOptions.model_validate(rdma | dict(options.transport_options))
    config = WorkerConfig(secret_file=f"{SECRET_FOLDER}/{SECRET_KEY}", transport=transport)
    arguments: dict[str, object] = {
        "--model-path": f"{BUNDLE_MOUNT}/{stage}",
        "--served-model-name": served.name,
        "--weight-version": served.plan_digest,
        "--host": "0.0.0.0",  # of the pod: its network policy says who may come in
        "--port": HTTP_PORT,
        "--dtype": served.dtype,
        "--page-size": options.page_size,
        "--tp-size": options.gpus(stage),
        "--disaggregation-mode": stage,
        "--disaggregation-transfer-backend": options.transport,
        ARGUMENT: json.dumps(config.override()),
    }
    flags = ["--enable-metrics", *window_flags(stage, served.sparse)]
    if stage == "prefill":
        arguments["--disaggregation-bootstrap-port"] = BOOTSTRAP_PORT
    arguments |= attention_arguments(stage, served.sparse, served.dtype) | pool_arguments(served.pool_dtype)
    arguments |= graph_arguments(stage, served.tail)
    pairs = [str(part) for pair in arguments.items() for part in pair]
    more = options.prefill_args if stage == "prefill" else options.decode_args
    return ["python3", "-m", "sglang.launch_server", *pairs, *flags, *more]


def worker_environment(served: Served) -> dict[str, str]:
    """Of a worker's container."""
    precision = precision_environment(served.dtype, served.conv_dtype)
    return {"SGLANG_PLUGINS": "pdtrim", "HF_HUB_OFFLINE": "1", "HOME": "/tmp"} | precision


ROUTER_ARGUMENTS = [
    "python3", "-m", "sglang_router.launch_router", "--pd-disaggregation",
    "--host", "0.0.0.0", "--port", str(ROUTER_PORT),
    "--prometheus-host", "0.0.0.0", "--prometheus-port", str(ROUTER_METRICS_PORT),
    "--policy", "round_robin", "--request-timeout-secs", "600", *ROUTER_HEALTH,
    "--worker-startup-timeout-secs", "1800", "--shutdown-grace-period-secs", str(GRACE_S - 10),
]  # fmt: skip
