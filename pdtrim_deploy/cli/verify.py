"""`pdtrim-deploy verify`: re-check every digest of a bundle."""

from __future__ import annotations

import json
from pathlib import Path

import click

from pdtrim_deploy.cli import options


@click.command()
@click.argument("bundle", type=options.path)
@options.json_flag
def verify(bundle: Path, as_json: bool) -> None:
    """Compare every file of BUNDLE with its manifest.

    Checks sizes and SHA-256, and lists missing and extra files. The manifest does not cover the stages' model cards
    (README.md), which eval fills in, and reports added after the build.
    Exit code 1 when something differs, 2 when BUNDLE is not a complete bundle.

    \b
    Examples:
      pdtrim-deploy verify out/bundle
      pdtrim-deploy verify out/bundle --json
    """
    from pdtrim_deploy.bundle import Bundle
    from pdtrim_deploy.cli.progress import Progress

    opened, progress = Bundle.open(bundle), Progress()
    with progress.show("verify"):
        problems = opened.verify(progress.note)
    if as_json:
        click.echo(
            json.dumps({"bundle": str(bundle), "files": len(opened.manifest.files), "problems": problems}, indent=2)
        )
    elif problems:
        click.echo("\n".join(f"{bundle}: {problem}" for problem in problems))
    else:
        click.echo(f"{bundle}: {len(opened.manifest.files)} files as sealed, plan {opened.plan.digest}")
    raise SystemExit(1 if problems else 0)
