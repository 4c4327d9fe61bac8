"""From a bundle to its cluster, with what the caller leaves open chosen."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from pdtrim_deploy.bundle import Bundle
from pdtrim_deploy.errors import UserError
from pdtrim_deploy.local.processor import compute_dtype
from pdtrim_deploy.models.body import check_body
from pdtrim_deploy.models.families import known_family
from pdtrim_deploy.plan import STAGES
from pdtrim_deploy.plan.link import Link
from pdtrim_deploy.serving.cluster import Cluster
from pdtrim_deploy.serving.engines import Executors, find_engine, require_batches
from pdtrim_deploy.serving.environment import ServeEnvironment
from pdtrim_deploy.serving.linear_attention import require_linear_attention
from pdtrim_deploy.serving.one_model import require_kind
from pdtrim_deploy.serving.ports import HOST, free_ports
from pdtrim_deploy.serving.ranks import attention_groups, require_arguments, require_ranks
from pdtrim_deploy.serving.relay import Throttle
from pdtrim_deploy.serving.sinks import require_torch_attention
from pdtrim_deploy.serving.spec import ClusterSpec, WorkerOptions
from pdtrim_deploy.serving.transports import require_transport
from pdtrim_deploy.serving.weights import require_weights


def cluster_of(
    bundle: Bundle,
    *,
    prefill: int = 1,
    decode: int = 1,
    workers: int = 1,
    port: int | None = None,
    options: WorkerOptions | None = None,
    executors: Executors | None = None,
    transport: Mapping[str, Any] | None = None,
    router_args: tuple[str, ...] = (),
    start_timeout_s: float = 600.0,
    environment: ServeEnvironment | None = None,
    log_dir: Path | None = None,
    gpus: int | None = None,
    say: Callable[[str], None] = lambda sentence: None,
) -> Cluster:
    """The bundle's cluster, not yet started; without `log_dir` its logs go to a new temporary folder.

    `prefill` and `decode` workers of a pair, `workers` of one model for both stages.

    `gpus` is how many GPUs there are for it; None: those of this machine.

    Raises:
        UserError: no SGLang found, no worker of a stage, `port` is taken, the bundle lacks an executor's engine or the
            weights that its plan has before a tail, the transport's library is not there, or decode's pool is to be
            split with no sparse layer; ranks that cannot be served, too few GPUs for them, or weights or an attention
            that the device does not compute.

    """
    environment = environment or ServeEnvironment.find()
    options = options or WorkerOptions(served_model_name=bundle.path.resolve().name)
    if options.dtype == "auto":  # SGLang's own auto makes float16 of a float32 checkpoint
        options = replace(options, dtype=bundle.plan.model.kv_dtype)
    if options.device == "cpu" and (fast := compute_dtype(options.dtype)) != options.dtype:
        say(
            f"this CPU has no {options.dtype} instructions: SGLang imitates them, and every token takes several times "
            f"as long as in {fast} (a bundle built with model.dtype {fast} takes twice the memory)"
        )
    options = replace(options, sparse=any(send.mode == "sparse" for send in bundle.plan.kv))
    options = replace(options, tail=bundle.plan.kv_only_tail > 0)
    options = replace(options, sinks=known_family(bundle.plan.model.architecture).sinks)
    options = replace(options, conv_dtype=bundle.plan.model.conv_dtype)
    options = replace(options, pool_dtype=bundle.plan.model.pool_dtype, plan_digest=bundle.plan.digest)
    if options.device == "cpu" and options.pool_dtype != "native" and bundle.plan.model.rope_dim is not None:
        raise UserError(
            f"the plan's KV pool is {options.pool_dtype}, which SGLang 0.5.23 has on a CPU for no model with latents "
            "(MLA); serve this bundle on GPUs, or build it with kv.pool_dtype native"
        )
    require_linear_attention(bundle.plan.model, options.dtype, options.device)
    if options.device == "cpu" and options.sinks:
        require_torch_attention(environment, bundle.plan.model.architecture)
    chosen = executors or Executors()
    require_kind(bundle, workers, (prefill, decode), options, chosen, transport or {})
    require_weights(bundle.decode_dir, options.device)
    check_body(bundle.prefill_dir, bundle.plan)
    if options.split_pool is not None and not options.sparse:
        raise UserError("--split-decode-pool: this plan has no sparse layers to split off; leave it out")
    stage_args = [options.extra_args if bundle.plan.unified else options.arguments(stage) for stage in STAGES]
    groups = attention_groups(stage_args[0]), attention_groups(stage_args[1])
    require_ranks(bundle.plan, options.tp_prefill, options.tp_decode, options.device, groups)
    require_arguments(options.extra_args, "--worker-args")
    require_arguments(options.prefill_args, "--prefill-args")
    require_arguments(options.decode_args, "--decode-args")
    shared: dict[str, Any] = {"port": port, "options": options, "router_args": router_args, "gpus": gpus}
    shared["start_timeout_s"] = start_timeout_s
    if bundle.plan.unified:
        spec = ClusterSpec.of_one_model(bundle.prefill_dir, workers=workers, **shared)
        return Cluster(spec, environment, log_dir or _log_folder(), say)
    require_transport(environment, options.transfer_backend, transport or {}, options.device)
    if decode > 1 and (alone := [name for name in ("port", "announce") if (transport or {}).get(name) is not None]):
        raise UserError(
            f"--transport-option {alone[0]}: the {decode} decode workers of this machine cannot all listen there; "
            "leave it out, or start one decode worker"
        )
    engines = {stage: find_engine(bundle, stage, chosen.of(stage), options.device) for stage in STAGES}
    for stage, engine in engines.items():
        require_batches(engine, options.chunked_prefill_size, options.requests, options.tp(stage))
    spec = ClusterSpec.on_loopback(
        bundle.prefill_dir,
        bundle.decode_dir,
        prefill=prefill,
        decode=decode,
        engines=engines,
        **shared,
    )
    spec = replace(spec, workers=tuple(replace(worker, transport=transport or {}) for worker in spec.workers))
    return Cluster(spec, environment, log_dir or _log_folder(), say)


def _log_folder() -> Path:
    return Path(tempfile.mkdtemp(prefix="pdtrim-serve-"))


@contextlib.contextmanager
def throttled(cluster: Cluster, link: Link) -> Iterator[Cluster]:
    """`cluster` (1 prefill + 1 decode worker, transport tcp), served with KV going over a link of this speed.

    The link is a relay on loopback: it holds bytes back as `link` would; its way back and the control channel are free.

    Raises:
        UserError: decode has several ranks, each of which listens at a port of its own; no KV travels.

    """
    if cluster.spec.unified:
        raise UserError("--link limits the KV between two stages, and one model for both sends none: leave it out")
    (decode,), spec = cluster.spec.decode, cluster.spec
    if decode.options.tp_decode > 1:
        raise UserError(
            f"--link limits KV to one rank of decode, not to {decode.options.tp_decode}: leave out one option"
        )
    used = {port for worker in spec.workers for port in (worker.port, worker.bootstrap_port or 0)}
    port, announced = free_ports(2, taken=frozenset(used | {spec.router.port, spec.router.metrics_port}))
    relayed = replace(decode, transport={**decode.transport, "port": port, "announce": f"{HOST}:{announced}"})
    cluster.spec = replace(spec, workers=(*spec.prefill, relayed))
    with contextlib.closing(Throttle(announced, port, link.bytes_per_s)), cluster:
        yield cluster
