"""`pdtrim-deploy eval`: how much quality a bundle, or a running pair, loses."""

from __future__ import annotations

from pathlib import Path

import click
from click.core import ParameterSource

from pdtrim_deploy.cli import options
from pdtrim_deploy.errors import UserError
from pdtrim_deploy.recipe.seed import MOST_SEED

OF_BUNDLES = (
    "include_path", "hand_over", "corpus", "sequences", "seed", "compute_dtype", "device", "memory", "device_memory",
)  # fmt: skip
OF_URLS = ("against", "of_bundle", "questions", "lengths", "max_tokens", "concurrency", "out", "allow_remote")


@click.command("eval")
@click.argument("target", metavar="BUNDLE|URL")
@click.option(
    "--tasks",
    help="Comma-separated. For a bundle: perplexity, choice, needle, agreement, lm_eval:NAME.  [default: only "
    "perplexity, as the recipe says]  For a URL: gsm8k, humaneval, mmlu, ruler, turns, instructions.",
)
@click.option(
    "--items",
    type=click.IntRange(1),
    help="Items of each task (needle: per depth; lm_eval and URL tasks: the first so many).  [default: the task's]",
)
@click.option("--include-path", type=options.path, help="Folder of task YAML and data for lm_eval:NAME.")
@click.option(
    "--hand-over",
    type=click.Choice(["served", "decode"]),
    help="Whose logits judge the first answer token of lm_eval tasks: prefill's (served), or those of decode, which "
    "then also reads the context's last token (decode).  [default: decode for likelihoods, served for texts]",
)
@click.option(
    "--corpus", help="Text to judge on, as in recipes: brown, code, dir:PATH, jsonl:PATH ...  [default: the recipe's]"
)
@click.option(
    "--sequences", type=click.IntRange(1), help="Sequences to judge; not with --tasks.  [default: the recipe's]"
)
@click.option(
    "--seed", type=click.IntRange(0, MOST_SEED), help="Seed that chooses text and items.  [default: the recipe's]"
)
@click.option(
    "--against", metavar="URL", help="For a URL: URL of the served dense model, which gets the same questions."
)
@click.option(
    "--bundle",
    "of_bundle",
    type=options.path,
    help="For a URL: the bundle that it serves. Its gates apply, and its reports and cards get the results.",
)
@click.option(
    "--questions", type=options.path, help="For a URL: file with questions for gsm8k.  [default: 100 of GSM8K]"
)
@click.option(
    "--lengths",
    type=options.TokenCounts(),
    help="For a URL: tokens of prompt and answer together, for ruler and turns.  [default: 4096,8192,16384]",
)
@click.option(
    "--max-tokens", type=click.IntRange(1), help="For a URL: most tokens of an answer.  [default: the task's]"
)
@click.option("--concurrency", type=options.some_clients, help="For a URL: questions sent at a time.  [default: 8]")
@click.option("--out", type=options.new_file, help="For a URL: file for the results, besides the reports of --bundle.")
@click.option("--allow-remote", is_flag=True, help="Allow a URL that is not on this machine.")
@options.device
@options.compute_dtype
@options.cache_dir
@options.dry_run
@options.json_flag
@click.pass_context
def evaluate(context: click.Context, target: str, tasks: str | None, **rest: object) -> None:
    """Compare the pair with the dense model: perplexity on held-out text, or --tasks.

    Both continue the same prompts. The result is also written to BUNDLE/reports/eval.json (tasks.json with --tasks),
    with seed, corpus, command and machine, and into the model cards of both stages. Tasks of lm-evaluation-harness run
    on the PD oracle; the answers to each question go to BUNDLE/reports/lm_eval. Their data come from the hub or, with
    --include-path, from local files.

    With a URL, the running pair at URL and the dense model at --against generate answers to the same questions, which
    sgl-eval sends. humaneval runs the programs that the models write, in a child process with limits.

    Exit code 1 when a task falls below its gate in the recipe's `quality`.

    \b
    Examples:
      pdtrim-deploy eval out/bundle
      pdtrim-deploy eval out/bundle --tasks perplexity,choice,needle,agreement --json
      pdtrim-deploy eval out/bundle --tasks lm_eval:hellaswag --items 500
      pdtrim-deploy eval http://127.0.0.1:8000 --against http://127.0.0.1:9000 --tasks gsm8k --bundle out/bundle
    """
    served = options.is_url(target)
    for name in OF_BUNDLES if served else OF_URLS:
        if context.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            option = "--bundle" if name == "of_bundle" else f"--{name.replace('_', '-')}"
            kinds = ("bundles", "a URL") if served else ("URLs", "a bundle")
            raise UserError(f"{option} is for {kinds[0]}, but {target} is {kinds[1]}; leave it out")
    chosen = {name: value for name, value in rest.items() if name not in (OF_BUNDLES if served else OF_URLS)}
    if served:
        from pdtrim_deploy.cli.eval_served import evaluate_served

        chosen.pop("compute")
        evaluate_served(context.obj, target, tasks, **chosen)  # type: ignore[arg-type]
    else:
        from pdtrim_deploy.cli.eval_bundle import evaluate_bundle

        evaluate_bundle(context.obj, Path(target), tasks, **chosen)  # type: ignore[arg-type]
