"""`pdtrim-deploy gpu-check`: what runs on this machine's GPU."""

from __future__ import annotations

from pathlib import Path

import click

from pdtrim_deploy.cli import options
from pdtrim_deploy.gpucheck.check import BUDGET_S
from pdtrim_deploy.gpucheck.command import run
from pdtrim_deploy.gpucheck.registry import PARTS


@click.command("gpu-check")
@click.option("--out", type=options.new_file, default="gpu-check.json", show_default=True, help="File for the result.")
@click.option("--part", "parts", multiple=True, metavar="NAME", help=f"Only this: {', '.join(PARTS)}; repeatable.")
@click.option("--seconds", type=options.seconds, default=BUDGET_S, show_default=True, help="For all parts together.")
@options.serve_python
@click.pass_context
def gpu_check(ctx: click.Context, out: Path, parts: tuple[str, ...], seconds: float, serve_python: Path | None) -> None:
    """Run on this machine's GPU the parts that have not run on one, and write the results to a file.

    \b
    Each part runs in its own processes with a deadline. A part is skipped, with the reason, if something is missing:
    SGLang, Triton, TensorRT, a transfer library, or time. The main parts come first; all parts need half an hour
    (--seconds 1800). No network is needed. If only torch and triton, or torch and nvcc, are installed,
    `python -m pdtrim_deploy.gpucheck` in a clone checks the kernels.
    Exit codes: 0 when nothing failed, 1 when a part failed, 2 without a CUDA device.

    \b
    Examples:
      pdtrim-deploy gpu-check
      pdtrim-deploy gpu-check --part kernels --out kernels.json
    """
    code = run(out, parts, serve_python, seconds, ctx.obj, lambda text: click.echo(text, err=True))
    raise SystemExit(code)
