"""`pdtrim-deploy deploy`: manifests of a bundle for Kubernetes and Compose."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from pdtrim_deploy.cli import options
from pdtrim_deploy.errors import UserError
from pdtrim_deploy.recipe.bounds import MOST_REPLICAS, MOST_TOKENS
from pdtrim_deploy.serving.gpu_defaults import PAGE_TOKENS
from pdtrim_deploy.serving.transports import LIBRARIES

replicas_or_gpus = click.IntRange(1, MOST_REPLICAS)
OF_KUBERNETES = ("memory", "monitoring")  # and `rdma`, which compose() refuses


@click.group()
def deploy() -> None:
    """Write what runs a bundle on a cluster, or on one host with GPUs.

    \b
    Examples:
      pdtrim-deploy deploy render out/bundle --prefill 2 --decode 6 --out out/kubernetes
      pdtrim-deploy deploy render out/bundle --to compose --bundle-from host:/srv/bundle --out out/compose
      pdtrim-deploy deploy dashboard > kv.json
    """


@deploy.command()
@click.argument("bundle", type=options.path)
@click.option("--out", type=options.path, help="Folder for the files; files of the same names are replaced.")
@click.option("--dry-run", is_flag=True, help="Print the files instead of writing them, without --out.")
@click.option("--to", type=click.Choice(["kubernetes", "compose"]), default="kubernetes", show_default=True)
@click.option("--prefill", type=replicas_or_gpus, default=1, show_default=True, help="Prefill workers.")
@click.option("--decode", type=replicas_or_gpus, default=1, show_default=True, help="Decode workers.")
@click.option("--tp-prefill", type=replicas_or_gpus, default=1, show_default=True, help="GPUs of a prefill worker.")
@click.option("--tp-decode", type=replicas_or_gpus, default=1, show_default=True, help="GPUs of a decode worker.")
@click.option("--name", default="pdtrim", show_default=True, help="Name of the objects.")
@click.option("--image", help="Image, built from the Dockerfile's target serve.  [default: pdtrim-serve:VERSION]")
@click.option(
    "--bundle-from",
    default="pvc:pdtrim-bundle",
    show_default=True,
    metavar="WHERE",
    help="Where workers read the bundle: pvc:CLAIM[/SUBPATH], oci:IMAGE (an image volume), or host:/FOLDER.",
)
@click.option(
    "--transport",
    "backend",
    type=click.Choice(["pdtrim_tcp", *LIBRARIES]),
    default="pdtrim_tcp",
    show_default=True,
    help="SGLang's KV transfer backend; the image holds its library.",
)
@options.transport_options
@click.option(
    "--rdma",
    metavar="RESOURCE",
    help="Extended resource of which each worker requests one, such as rdma/hca. The nodes' container runtime must "
    "allow locked memory (memlock).",
)
@click.option(
    "--page-size",
    type=click.IntRange(1, MOST_TOKENS),
    default=PAGE_TOKENS,
    show_default=True,
    help="Tokens per KV page.",
)
@click.option("--memory", default="64Gi", show_default=True, help="Memory of a worker.")
@click.option("--monitoring", default="monitoring", show_default=True, help="Namespace that may scrape metrics.")
@click.option(
    "--prefill-args", default="", callback=options.words, help="More arguments for prefill workers, one quoted string."
)
@click.option("--decode-args", default="", callback=options.words, help="The same, for decode workers.")
@options.json_flag
@click.pass_context
def render(
    ctx: click.Context,
    bundle: Path,
    out: Path | None,
    dry_run: bool,
    to: str,
    prefill: int,
    decode: int,
    tp_prefill: int,
    tp_decode: int,
    name: str,
    image: str | None,
    bundle_from: str,
    backend: str,
    transport_options: dict[str, Any],
    rdma: str | None,
    page_size: int,
    memory: str,
    monitoring: str,
    prefill_args: tuple[str, ...],
    decode_args: tuple[str, ...],
    as_json: bool,
) -> None:
    """Write a Kustomize base, or a Compose file, that serves BUNDLE.

    Nothing of this has run on a cluster yet: the manifests are rendered by Kustomize and checked against Kubernetes'
    schemas.
    """
    from pdtrim_deploy.bundle import Bundle
    from pdtrim_deploy.local.atomic import write_atomic
    from pdtrim_deploy.manifests import BundleAt, Options, Served, compose, kubernetes, yaml_text
    from pdtrim_deploy.manifests.kubernetes import secret_name
    from pdtrim_deploy.manifests.options import IMAGE
    from pdtrim_deploy.models.body import check_body
    from pdtrim_deploy.serving.linear_attention import require_linear_attention
    from pdtrim_deploy.serving.ranks import attention_groups, require_ranks

    if (out is None) != dry_run:
        raise UserError("say where the files go, --out FOLDER, or --dry-run to have them printed")
    for option in OF_KUBERNETES if to == "compose" else ():
        if ctx.get_parameter_source(option) is ParameterSource.COMMANDLINE:
            raise UserError(f"--{option} is for Kubernetes; leave it out with --to compose")
    opened = Bundle.open(bundle)
    if opened.plan.unified:
        raise UserError(
            f"{bundle} is one model for both stages: run {opened.prefill_dir} as any model in SGLang; manifests are "
            "rendered for pairs"
        )
    check_body(opened.prefill_dir, opened.plan)
    require_linear_attention(opened.plan.model, opened.plan.model.kv_dtype)
    groups = attention_groups(prefill_args), attention_groups(decode_args)
    require_ranks(opened.plan, tp_prefill, tp_decode, groups=groups)
    chosen = Options(
        name=name,
        prefill=prefill,
        decode=decode,
        tp_prefill=tp_prefill,
        tp_decode=tp_decode,
        image=image or IMAGE,
        bundle=BundleAt.parse(bundle_from),
        rdma=rdma,
        transport=backend,
        transport_options=transport_options,
        page_size=page_size,
        memory=memory,
        monitoring=monitoring,
        prefill_args=prefill_args,
        decode_args=decode_args,
    )
    served = Served.of(opened.path.resolve().name, opened.plan)
    files = {"compose.yaml": [compose(served, chosen)]} if to == "compose" else kubernetes(served, chosen)
    texts = {file: yaml_text(documents) for file, documents in files.items()}
    if out is None:
        if as_json:
            click.echo(json.dumps({"plan": opened.plan.digest, "files": files}))
        else:
            click.echo("---\n".join(f"# {file}\n{text}" for file, text in texts.items()), nl=False)
        return
    for file, text in texts.items():
        write_atomic(out / file, text)
    if as_json:
        click.echo(json.dumps({"out": str(out), "plan": opened.plan.digest, "files": list(files)}))
        return
    click.echo(f"{out}: {', '.join(files)} for plan {opened.plan.digest[:12]}")
    if to == "compose":
        secret, file = (shlex.quote(str(out / name)) for name in ("kv-secret", "compose.yaml"))
        click.echo(f"next: (umask 077; openssl rand -hex 32 > {secret}); chown 10001 {secret}")
        click.echo(f"      docker compose -f {file} up")
    else:
        create_secret = f"kubectl create secret generic {secret_name(chosen)} --from-literal=kv=$(openssl rand -hex 32)"
        click.echo(f"next: {create_secret}\n      kubectl apply -k {shlex.quote(str(out))}")


@deploy.command()
def dashboard() -> None:
    """Print the Grafana dashboard of the KV transfer, as JSON."""
    from pdtrim_deploy.manifests.dashboard import dashboard as grafana_dashboard

    click.echo(json.dumps(grafana_dashboard(), indent=2))
