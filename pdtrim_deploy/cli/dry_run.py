"""What `--dry-run` says: everything is read and checked, nothing is started or written."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import click
import yaml

from pdtrim_deploy.bundle import Bundle
from pdtrim_deploy.serving import Cluster, Executors, ServeEnvironment, WorkerOptions, cluster_of, commands


def commands_of(cluster: Cluster) -> dict[str, list[str]]:
    """The command of each program by its name, as the cluster would start it."""
    spec, python = cluster.spec, cluster.environment.python
    said = {worker.name: commands.worker_command(python, worker) for worker in spec.workers}
    return said | {"router": commands.router_command(python, spec)}


def programs(bundle: Bundle, executors: Executors | None, serve_python: Path | None) -> dict[str, list[str]]:
    """The commands of the pair that would be started for `bundle`."""
    environment = ServeEnvironment.find(serve_python)
    options = pair_options(bundle)
    return commands_of(
        cluster_of(bundle, options=options, executors=executors, environment=environment, log_dir=Path())
    )


def pair_options(bundle: Bundle) -> WorkerOptions:
    """Of a pair that is up for a check alone: two workers may share the only GPU."""
    return WorkerOptions(served_model_name=bundle.path.resolve().name, share_gpus=True)


def say(found: dict[str, Any], as_json: bool) -> None:
    """JSON for machines; YAML for people, commands as one would type them."""
    if as_json:
        click.echo(json.dumps(found, indent=2))
        return
    click.echo("nothing is started or written (--dry-run)")
    click.echo(yaml.safe_dump(_typed(found), sort_keys=False, width=10_000, allow_unicode=True), nl=False)


def _typed(value: Any) -> Any:
    """A command, which is a list of strings, as one line."""
    if isinstance(value, dict):
        return {key: _typed(inside) for key, inside in value.items()}
    return shlex.join(value) if isinstance(value, list) and all(isinstance(one, str) for one in value) else value
