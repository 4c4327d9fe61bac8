"""`pdtrim-deploy plan`: bytes, link time and memory of a plan, without machines or weights."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import click

from pdtrim_deploy.cli import options
from pdtrim_deploy.cli.plan_workers import Workers, workers_options
from pdtrim_deploy.errors import UserError


def _positive(ctx: click.Context, param: click.Parameter, value: Any) -> Any:
    if value is not None and not (math.isfinite(value) and value > 0):
        raise UserError(f"{param.opts[0]} is {value}; give a number above 0")
    return value


@click.command()
@click.argument("targets", metavar="RECIPE|BUNDLE|CONFIG.json|MODEL...", nargs=-1, required=True)
@click.option("--config", metavar="FILE|MODEL", help="Model of all recipes: a config.json, or a shipped model's name.")
@click.option("--isl", type=click.IntRange(1), default=4096, show_default=True, help="Prompt tokens a request.")
@click.option("--osl", type=click.IntRange(1), default=256, show_default=True, help="Answer tokens a request.")
@click.option("--link", default="25Gbps", show_default=True, help="Between prefill and decode: 100Gb/s, 40GB/s, ...")
@click.option("--max-utilisation", type=float, default=0.8, show_default=True, help="Largest share of the link to use.")
@click.option("--rate", type=float, callback=_positive, help="Requests/s: do they fit, and what link would they need?")
@click.option(
    "--prefill-tokens-per-s",
    type=float,
    callback=_positive,
    help="Prefill speed of the unpruned model; needed for the share of TTFT.",
)
@workers_options
@options.json_flag
@click.pass_obj
def plan(
    command: str,
    targets: tuple[str, ...],
    config: str | None,
    isl: int,
    osl: int,
    link: str,
    max_utilisation: float,
    rate: float | None,
    prefill_tokens_per_s: float | None,
    workers: Workers,
    as_json: bool,
) -> None:
    """Compute bytes, link time, decode memory and largest request rate of each target and of its unpruned model.

    This takes seconds and reads no weights; for a recipe it assumes the numbers of blocks and layers that the recipe
    removes or cuts. With --rates, also compute how many prefill and decode workers carry --rate within an SLO. Exit
    code 0 even when --rate does not fit.

    \b
    Examples:
      pdtrim-deploy plan llama-3.1-8b --isl 8192 --link 100Gbps
      pdtrim-deploy plan recipes/smollm2-demo.yaml --rate 20
      pdtrim-deploy plan a.yaml b.yaml --config qwen2.5-7b --prefill-tokens-per-s 12000 --json
      pdtrim-deploy plan llama-3.1-8b --rates rates.yaml --rate 20 --slo-ttft 1s --slo-itl 30ms --simulate
    """
    from pdtrim_deploy.models.latent_rows import latents_sentence
    from pdtrim_deploy.models.state_bytes import states_sentence
    from pdtrim_deploy.models.window_savings import windows_sentence
    from pdtrim_deploy.sizing import Link, Traffic, price, subjects

    if not 0 < max_utilisation <= 1:
        raise UserError(f"--max-utilisation is {max_utilisation}; give a share above 0 and at most 1")
    traffic = Traffic(isl, osl, Link.parse(link), max_utilisation, rate, prefill_tokens_per_s)
    goal = workers.goal(traffic)
    all_subjects = subjects(targets, config)
    rates = workers.unpruned(all_subjects, isl) if goal else None
    if rates:
        traffic = replace(traffic, prefill_tokens_per_s=rates.prefill_tokens_per_s)
    for subject in all_subjects:
        subject.check_length(isl, osl)
    priced = [(subject, price(subject.plan, traffic)) for subject in all_subjects]
    sides = workers.sides(all_subjects, rates, goal) if rates and goal else {}
    if as_json:
        traffic_json = {"isl": isl, "osl": osl, "link_bits_per_s": traffic.link.bits_per_s, "rate": rate}
        traffic_json |= {"max_utilisation": max_utilisation, "prefill_tokens_per_s": traffic.prefill_tokens_per_s}
        data: dict[str, Any] = {
            "traffic": traffic_json,
            "assumptions": traffic.assumptions(),
            "prices": [
                {"name": s.name, "kind": s.kind, "model": s.model, "shape": s.plan.model.model_dump(), "notes": s.notes}
                | cost.model_dump()
                for s, cost in priced
            ],
        }
        if rates and goal:
            from pdtrim_deploy.bundle.environment import environment

            data |= {"workers": workers.as_json(sides, rates, goal), "environment": environment(command)}
        if len(all_subjects) == 1:
            data["plan_digest"] = all_subjects[0].plan.digest
        click.echo(json.dumps(data, indent=2))
        return
    from pdtrim_deploy.cli.screen import console
    from pdtrim_deploy.report.sizing_table import sizing_table

    console().print(sizing_table(priced, traffic))
    for sentence in traffic.assumptions():
        click.echo(f"assumed: {sentence}")
    for subject in all_subjects:
        plan = subject.plan
        sentences = windows_sentence(plan, isl), latents_sentence(plan), states_sentence(plan, isl)
        for note in (*subject.notes, *filter(None, sentences)):
            click.echo(f"{subject.name}: {note}")
    if rates and goal:
        workers.report(sides, rates, goal)
