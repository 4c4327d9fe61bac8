"""`pdtrim-deploy report`: everything measured on a bundle, on one page."""

from __future__ import annotations

import json
from pathlib import Path

import click

from pdtrim_deploy.cli import options


@click.command()
@click.argument("bundle", type=options.path)
@click.option("--out", type=options.new_file, help="The HTML file.  [default: BUNDLE/reports/report.html]")
@click.option("--compare", "comparisons", type=options.path, multiple=True, help="JSON of `compare --out`; repeatable.")
@click.option("--pareto", type=options.path, help="benchmarks/results/kv.json of `make bench-kv`.")
@click.option("--faults", type=options.path, help="benchmarks/results/faults.json of `make bench-faults`.")
@options.json_flag
@click.pass_obj
def report(
    command: str,
    bundle: Path,
    out: Path | None,
    comparisons: tuple[Path, ...],
    pareto: Path | None,
    faults: Path | None,
    as_json: bool,
) -> None:
    """Write one self-contained HTML page about BUNDLE.

    It shows the plan block by block, quality, load and engines, from BUNDLE/reports and the given files. Each figure
    names the command that made it, and each missing figure the command that would make it.

    \b
    Examples:
      pdtrim-deploy report out/demo/pruned
      pdtrim-deploy report out/bundle --compare compare.json --pareto benchmarks/results/kv.json --out page.html
    """
    from pdtrim_deploy.bundle import Bundle
    from pdtrim_deploy.local.atomic import write_atomic
    from pdtrim_deploy.report.html import Findings, page

    opened = Bundle.open(bundle)
    out = out or opened.reports_dir / "report.html"
    text = page(Findings.of(opened, comparisons, pareto, faults), command)
    write_atomic(out, text)
    summary = {"page": str(out), "plan": opened.plan.digest, "bytes": len(text.encode())}
    click.echo(json.dumps(summary) if as_json else out)
