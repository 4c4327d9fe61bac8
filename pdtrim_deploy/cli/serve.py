"""`pdtrim-deploy serve`: serve a bundle at one endpoint until Ctrl-C."""

from __future__ import annotations

import json
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import click
from rich.table import Table

from pdtrim_deploy.bundle import Bundle
from pdtrim_deploy.cli import options
from pdtrim_deploy.cli.dry_run import commands_of
from pdtrim_deploy.cli.screen import console
from pdtrim_deploy.doctor import CheckContext, require
from pdtrim_deploy.serving import Cluster, Executors, ServeEnvironment, WorkerOptions, cluster_of
from pdtrim_deploy.serving.environment import gpu_count
from pdtrim_deploy.serving.gpu_defaults import PAGE_TOKENS
from pdtrim_deploy.serving.spec import SMALL_POOL_TOKENS, SMALL_REQUESTS
from pdtrim_deploy.worker.decode_pool import SplitPool

DTYPES = ("auto", "float32", "bfloat16", "float16", "float", "half")  # SGLang's


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--prefill", type=options.some_workers, default=1, show_default=True, help="Prefill workers.")
@click.option("--decode", type=options.some_workers, default=1, show_default=True, help="Decode workers.")
@click.option("--workers", type=options.some_workers, default=1, show_default=True, help="Workers of a unified bundle.")
@click.option("--tp-prefill", type=click.IntRange(1), default=1, show_default=True, help="GPUs of a prefill worker.")
@click.option("--tp-decode", type=click.IntRange(1), default=1, show_default=True, help="GPUs of a decode worker.")
@click.option("--share-gpus", is_flag=True, help="Let several workers share a GPU if there are too few.")
@click.option("--port", type=click.IntRange(1, 65535), help="The router's port (default: a free one).")
@options.executors
@click.option("--page-size", type=click.IntRange(1), help=f"Tokens per KV page.  [default: 1; on GPUs {PAGE_TOKENS}]")
@click.option("--chunked-prefill-size", type=int, help="Prompt tokens per prefill chunk; -1: do not chunk.")
@click.option(
    "--max-total-tokens",
    type=click.IntRange(1),
    help=f"KV pool, in tokens.  [default: {SMALL_POOL_TOKENS}; on GPUs what fits]",
)
@options.split_pool
@click.option(
    "--max-running-requests", type=click.IntRange(1), help=f"[default: {SMALL_REQUESTS}; on GPUs SGLang's own]"
)
@click.option("--dtype", type=click.Choice(DTYPES), default="auto", show_default=True, help="auto: the checkpoint's.")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
@click.option("--transport", "backend", default="pdtrim_tcp", show_default=True, help="SGLang's KV transfer backend.")
@options.transport_options
@click.option(
    "--send-by-layer", is_flag=True, help="Send rows of finished layers while prefill computes the layers after them."
)
@click.option("--threads", type=click.IntRange(1), help="OpenMP threads per worker (default: cores / workers).")
@click.option(
    "--start-timeout",
    type=options.seconds,
    default=600.0,
    show_default=True,
    help="Seconds that servers may take to start.",
)
@options.serve_python
@click.option(
    "--log-dir", type=click.Path(path_type=Path), help="Folder with one log file per program (default: a new folder)."
)
@click.option(
    "--worker-args",
    default="",
    callback=options.words,
    help="More arguments for sglang.launch_server, as one quoted string.",
)
@click.option("--prefill-args", default="", callback=options.words, help="The same, only for prefill workers.")
@click.option("--decode-args", default="", callback=options.words, help="The same, only for decode workers.")
@click.option(
    "--router-args", default="", callback=options.words, help="More arguments for the router, as one quoted string."
)
@click.option("--dry-run", is_flag=True, help="Print the command of every program; start none.")
@click.option("--json", "as_json", is_flag=True, help="Print the endpoints as one JSON line.")
def serve(
    bundle: Path,
    prefill: int,
    decode: int,
    workers: int,
    tp_prefill: int,
    tp_decode: int,
    share_gpus: bool,
    port: int | None,
    executors: Executors | None,
    page_size: int | None,
    chunked_prefill_size: int | None,
    max_total_tokens: int | None,
    split_pool: SplitPool | None,
    max_running_requests: int | None,
    dtype: str,
    device: Literal["auto", "cpu", "cuda"],
    backend: str,
    transport_options: dict[str, Any],
    send_by_layer: bool,
    threads: int | None,
    start_timeout: float,
    serve_python: Path | None,
    log_dir: Path | None,
    worker_args: tuple[str, ...],
    prefill_args: tuple[str, ...],
    decode_args: tuple[str, ...],
    router_args: tuple[str, ...],
    dry_run: bool,
    as_json: bool,
) -> None:
    """Serve BUNDLE: SGLang prefill and decode workers behind the router, until Ctrl-C or until one dies.

    A bundle of one model for both stages (`stages: unified`) is served by workers without disaggregation.

    \b
    /v1/chat/completions, /v1/completions and /generate answer at the printed router address.
    Exit codes: 130 after Ctrl-C, 1 when a worker or the router died or did not start.

    \b
    Examples:
      pdtrim-deploy serve out/bundle --port 8000
      pdtrim-deploy serve out/bundle --prefill 2 --decode 2 --json
      pdtrim-deploy serve out/bundle --decode-executor onnxruntime --log-dir out/logs
      pdtrim-deploy serve out/bundle --tp-prefill 2 --tp-decode 2 --decode-args "--max-running-requests 64"
    """
    opened = Bundle.open(bundle)
    if not dry_run:
        require("serve", CheckContext(serve_python=serve_python))
    worker_options = WorkerOptions(
        transfer_backend=backend,
        served_model_name=opened.path.resolve().name,
        page_size=page_size,
        chunked_prefill_size=chunked_prefill_size,
        max_total_tokens=max_total_tokens,
        split_pool=split_pool,
        send_by_layer=send_by_layer,
        max_running_requests=max_running_requests,
        dtype=dtype,
        threads=threads,
        tp_prefill=tp_prefill,
        tp_decode=tp_decode,
        share_gpus=share_gpus,
        extra_args=worker_args,
        prefill_args=prefill_args,
        decode_args=decode_args,
    )
    worker_options = worker_options if device == "auto" else replace(worker_options, device=device)
    for_other_host = dry_run and not gpu_count()  # the commands are for a host that has as many GPUs as they take
    starting = cluster_of(
        opened,
        prefill=prefill,
        decode=decode,
        workers=workers,
        port=port,
        options=worker_options,
        executors=executors,
        transport=transport_options,
        router_args=router_args,
        start_timeout_s=start_timeout,
        environment=ServeEnvironment.find(serve_python),
        log_dir=log_dir or (Path() if dry_run else None),  # None makes a folder
        gpus=(workers + prefill) * tp_prefill + decode * tp_decode if for_other_host else None,
        say=lambda sentence: click.echo(sentence, err=True),
    )
    if dry_run:
        command_lines = commands_of(starting)
        click.echo(json.dumps(command_lines) if as_json else "\n".join(map(shlex.join, command_lines.values())))
        return
    with starting as cluster:
        if as_json:
            click.echo(json.dumps(endpoints(cluster, opened)))
        else:
            console().print(table(cluster, opened))
            click.echo("Ctrl-C stops everything.", err=True)
        sys.stdout.flush()
        cluster.wait()


def endpoints(cluster: Cluster, bundle: Bundle) -> dict[str, object]:
    """What `--json` prints."""
    router = cluster.spec.router
    return {
        "url": cluster.url,
        "model": cluster.spec.workers[0].options.served_model_name,
        "plan": bundle.plan.digest,
        "router": {"url": router.url, "metrics": router.metrics_url, "log": str(cluster.router_log)},
        "workers": [
            {
                "name": worker.spec.name,
                "stage": worker.spec.role,
                "executor": worker.spec.executor,
                "url": worker.spec.url,
                "metrics": worker.metrics_url,
                "bootstrap_port": worker.spec.bootstrap_port,
                "pid": worker.pid,
                "log": str(worker.log),
            }
            for worker in cluster.workers
        ],
    }


def table(cluster: Cluster, bundle: Bundle) -> Table:
    """The endpoints as a table."""
    shown = Table(title=f"{bundle.path} serves plan {bundle.plan.digest[:12]}", title_justify="left")
    for column in ("program", "executor", "address", "metrics", "log"):
        shown.add_column(column, overflow="fold")
    shown.add_row("router", "", cluster.url, cluster.spec.router.metrics_url, str(cluster.router_log))
    for worker in cluster.workers:
        shown.add_row(worker.spec.name, worker.spec.executor, worker.spec.url, worker.metrics_url, str(worker.log))
    return shown
