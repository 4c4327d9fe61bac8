"""`pdtrim-deploy compare`: two pairs under the same load, in turns."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import click

from pdtrim_deploy.cli import dry_run as dry_runs
from pdtrim_deploy.cli import options
from pdtrim_deploy.errors import UserError
from pdtrim_deploy.recipe.bounds import MOST_ROUNDS
from pdtrim_deploy.serving.engines import EXECUTORS, Executors
from pdtrim_deploy.serving.transports import Transport
from pdtrim_deploy.worker.transport import TransportOptions


class Pair(click.ParamType):
    """`torch`, or `onnxruntime,torch` for prefill and decode."""

    name = "EXECUTOR[,EXECUTOR]"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> Executors:
        """One executor for both stages, or one for each."""
        if isinstance(value, Executors):
            return value
        names = str(value).split(",")
        if len(names) > 2 or not set(names) <= set(EXECUTORS):
            self.fail(f"{value!r}: give one of {', '.join(EXECUTORS)}, or two as PREFILL,DECODE", param, ctx)
        return Executors(names[0], names[-1])  # type: ignore[arg-type]


@click.command()
@click.argument("first", metavar="A")
@click.argument("second", metavar="B")
@click.option("--scenario", "scenario_file", type=options.path, help="YAML, see scenarios/.  [default: 8 closed-loop]")
@click.option(
    "--rounds",
    type=click.IntRange(1, MOST_ROUNDS),
    default=6,
    show_default=True,
    help="Times that each side runs the scenario.",
)
@click.option("--a-executor", type=Pair(), help="Executor of A, if it is a bundle.  [default: torch]")
@click.option("--b-executor", type=Pair(), help="Executor of B, if it is a bundle.  [default: torch]")
@click.option("--a-transport", help="KV transfer backend of A, if it is a bundle.  [default: pdtrim_tcp]")
@click.option("--b-transport", help="The same, for B.")
@click.option(
    "--a-transport-option", multiple=True, metavar="KEY=VALUE", help="Like serve's --transport-option, for A."
)
@click.option("--b-transport-option", multiple=True, metavar="KEY=VALUE", help="The same, for B.")
@click.option(
    "--link", help="Simulate a link of this speed between prefill and decode, such as 100Mbps. Only for bundles."
)
@click.option("--driver", "driver_name", default="builtin", show_default=True, help="builtin or aiperf.")
@click.option("--allow-remote", is_flag=True, help="Allow a URL that is not on this machine.")
@click.option("--out", type=options.new_file, help="Write the result here too, as JSON; `report` reads it.")
@options.serve_python
@options.dry_run
@options.json_flag
@click.pass_obj
def compare(
    command: str,
    first: str,
    second: str,
    scenario_file: Path | None,
    rounds: int,
    a_executor: Executors | None,
    b_executor: Executors | None,
    a_transport: str | None,
    b_transport: str | None,
    a_transport_option: tuple[str, ...],
    b_transport_option: tuple[str, ...],
    link: str | None,
    driver_name: str,
    allow_remote: bool,
    out: Path | None,
    serve_python: Path | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Compare two pairs under the same load, by ratios of B over A.

    A and B are bundles (each is served as 1 prefill + 1 decode) or URLs of routers. Both are up at once and take the
    load in turns, so that other programs slow both alike. Each figure is the geometric mean of the rounds' ratios,
    with its 95% interval. Exit code 1 when a request failed.

    \b
    Examples:
      pdtrim-deploy compare out/demo/dense out/demo/pruned --scenario scenarios/smoke.yaml
      pdtrim-deploy compare out/bundle out/bundle --b-executor onnxruntime --rounds 8
      pdtrim-deploy compare out/bundle out/bundle --b-transport pdtrim_nixl
      pdtrim-deploy compare out/demo/dense out/demo/pruned --link 100Mbps
    """
    from pdtrim_deploy.bundle.environment import environment
    from pdtrim_deploy.cli.progress import Progress
    from pdtrim_deploy.cli.screen import console
    from pdtrim_deploy.cli.target import Target
    from pdtrim_deploy.loadtest import Scenario, check_scenario, driver
    from pdtrim_deploy.loadtest.rounds import Comparison, Side, check_rounds, interleave, repeats
    from pdtrim_deploy.local.atomic import write_atomic
    from pdtrim_deploy.report.tables import ratio_table
    from pdtrim_deploy.serving.relay import relayed_link

    check_rounds(rounds)
    drive = driver(driver_name)
    scenario = Scenario.load(scenario_file) if scenario_file else Scenario.closed(8, 2, (256, 256), (24, 24))
    check_scenario(driver_name, scenario)
    given_sides = (
        (first, a_executor, a_transport, a_transport_option),
        (second, b_executor, b_transport, b_transport_option),
    )
    names = [_name(*side) for side in given_sides]
    if len({_name(_place(side[0]), side[1], side[2], side[3]) for side in given_sides}) == 1:
        advice = "give two bundles, or another executor or transport: --b-executor, --b-transport"
        raise UserError(f"A and B are both {names[0]}; {advice}")
    slow = relayed_link(link) if link is not None else None
    pair = [
        Target.of(
            target, executors, serve_python, allow_remote, slow, _transport(backend, transport_options), beside=True
        )
        for target, executors, backend, transport_options in given_sides
    ]
    scenario_json = scenario.model_dump(mode="json", exclude_none=True)
    if dry_run:
        sides = {name: target.described() for name, target in zip(names, pair, strict=True)}
        planned = {"driver": driver_name, "rounds": rounds, "link": link, "scenario": scenario_json, "sides": sides}
        dry_runs.say(planned, as_json)
        return
    for target in pair:
        target.check()
    progress = Progress()
    with ExitStack() as stack:
        up = {name: Side(*target.up(stack, progress, name)) for name, target in zip(names, pair, strict=True)}
        with progress.show("load, in turns"):
            results = interleave(up, repeats(scenario, rounds), drive, driver_name, progress.note)
    result = Comparison(
        first=names[0],
        second=names[1],
        scenario=scenario_json,
        link=str(slow) if slow else None,
        rounds=rounds,
        ratios=tuple(results.ratios(*names)),
        dropped=tuple(results.dropped(*names)),
        load=results.total,
        environment=environment(command),
    )
    text = result.model_dump_json(indent=2)
    if out is not None:
        write_atomic(out, text + "\n")
    if as_json:
        click.echo(text)
    else:
        console().print(ratio_table(result.first, result.second, result.ratios))
    for problem in result.problems:
        click.echo(f"problem: {problem}", err=True)
    raise SystemExit(1 if any(side.failed for side in result.load.values()) else 0)


def _transport(backend: str | None, transport_options: tuple[str, ...]) -> Transport | None:
    """None when neither option was given."""
    if backend is None and not transport_options:
        return None
    return Transport(backend or Transport().backend, TransportOptions.parse(transport_options))


def _place(target: str) -> str:
    """The same for `b` and `b/`."""
    return target.rstrip("/") if "://" in target else str(Path(target).resolve())


def _name(target: str, executors: Executors | None, backend: str | None, transport_options: tuple[str, ...]) -> str:
    """The name of a side in tables."""
    chosen = executors or Executors()
    parts = [] if chosen == Executors() else [" + ".join(dict.fromkeys((chosen.prefill, chosen.decode)))]
    parts += [backend] if backend not in (None, Transport().backend) else []
    parts += transport_options
    return f"{target} ({', '.join(parts)})" if parts else target
