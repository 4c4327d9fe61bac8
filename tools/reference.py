"""Write docs/reference/*.md from the code: commands, recipe, plan, bundle, metrics, exit codes.

python tools/reference.py [FOLDER]      # what `make docs` runs; needs the core's dependencies only
"""

import ast
import json
import sys
from pathlib import Path
from typing import Any

import click
from tables import families as tables_families

from pdtrim_deploy.bundle import Manifest
from pdtrim_deploy.cli import GROUPS, cli
from pdtrim_deploy.cli.exit_codes import EXIT_CODES
from pdtrim_deploy.plan import PDPlan
from pdtrim_deploy.recipe import Recipe

ROOT = Path(__file__).resolve().parent.parent
FAMILIES = ROOT / "benchmarks" / "results" / "families.json"
METRICS = ROOT / "plugins" / "pdtrim_sglang" / "metrics.py"
ENDS: dict[str, tuple[str, ...]] = {"Histogram": ("_bucket", "_sum", "_count"), "Counter": ("_total",), "Gauge": ()}


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A Markdown table."""
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def commands() -> str:
    """Every command's help, as a terminal of 100 columns shows it."""
    parts = ["# Commands"]
    for heading, names in GROUPS.items():
        parts.append(f"## {heading}")
        for name in names:
            command = cli.get_command(click.Context(cli), name)
            assert command is not None
            parts += _help(command, f"pdtrim-deploy {name}", 3)
    return "\n\n".join(parts)


def _help(command: click.Command, path: str, level: int) -> list[str]:
    context = click.Context(command, info_name=path, max_content_width=100, terminal_width=100)
    parts = [f"{'#' * level} {path}", f"```text\n{command.get_help(context)}\n```"]
    if isinstance(command, click.Group):
        for name, inside in command.commands.items():
            parts += _help(inside, f"{path} {name}", level + 1)
    return parts


def schema(title: str, model: Any, intro: str) -> str:
    """Every object of a pydantic model's schema as a table of its keys."""
    root = model.model_json_schema()
    parts = [f"# {title}", intro]
    for name, section in {model.__name__: root, **root.get("$defs", {})}.items():
        if "properties" not in section:
            continue
        required = set(section.get("required", ()))
        rows = [
            (
                f"`{key}`",
                _type(value),
                "required" if key in required else f"`{_short(value.get('default'))}`",
                value.get("description", ""),
            )
            for key, value in section["properties"].items()
        ]
        text = " ".join(section.get("description", "").split("Attributes:")[0].split())
        attributes = section.get("description", "").partition("Attributes:")[2].strip()
        parts += [f"## {name}", text, table(("key", "value", "default", ""), rows)]
        if attributes:
            parts.append("\n".join(f"- {line.strip()}" for line in _joined(attributes)))
    return "\n\n".join(part for part in parts if part)


def _joined(text: str) -> list[str]:
    """Attribute paragraphs, each on one line: a line that names keys begins a new one."""
    lines: list[str] = []
    for line in text.splitlines():
        start = line.split(":")[0].replace(",", " ").split()
        if ":" in line and all(word.isidentifier() for word in start):
            lines.append(f"`{', '.join(start)}`:{line.partition(':')[2]}")
        elif lines:
            lines[-1] += " " + line.strip()
    return lines


def _short(value: Any) -> str:
    text = repr(value) if not isinstance(value, str) else value
    return text if len(text) <= 60 else "see its section"


def _type(value: dict[str, Any]) -> str:  # noqa: PLR0911 (a line for each kind of value)
    if "$ref" in value:
        return value["$ref"].rsplit("/", 1)[1]
    for many in ("anyOf", "oneOf"):
        if many in value:
            return " or ".join(dict.fromkeys(_type(option) for option in value[many]))
    if "enum" in value:
        return ", ".join(f"`{option}`" for option in value["enum"])
    if "const" in value:
        return f"`{value['const']}`"
    if value.get("type") == "array":
        inside = value.get("items") or (value.get("prefixItems") or [{}])[0]
        return f"list of {_type(inside)}"
    if value.get("type") == "object" and isinstance(value.get("additionalProperties"), dict):
        return f"mapping to {_type(value['additionalProperties'])}"
    bounds = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    limits = [f"{sign} {value[key]:g}" for key, sign in bounds.items() if key in value]
    return " ".join([value.get("type", "any"), *limits])


def metrics() -> str:
    """What the plugin exports, read from the calls that make the metrics."""
    rows = []
    for node in ast.walk(ast.parse(METRICS.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ENDS:
            name, text, *labels = (ast.literal_eval(argument) for argument in node.args)
            ends = ENDS[node.func.id]
            label = f", by {', '.join(labels[0])}" if labels else ""
            rows.append((f"`{name}`", node.func.id.lower() + label, ", ".join(f"`{e}`" for e in ends) or "-", text))
    assert rows, "no metric was found"
    return "\n\n".join(
        [
            "# Metrics",
            "Each prefill worker counts what it sends, once a request, when it ends (`--enable-metrics`, `/metrics`; "
            "`serve` and the manifests switch it on); the gauges are of both stages. SGLang's own metrics stand beside "
            "them. A Grafana dashboard of both: `pdtrim-deploy deploy dashboard`.",
            table(("name", "kind", "samples end in", "what"), rows),
        ]
    )


def exit_codes() -> str:
    """The table of exit codes."""
    return "# Exit codes\n\n" + table(("code", "means"), [(str(code), meaning) for code, meaning in EXIT_CODES.items()])


def families() -> str:
    """What the tests of families prove."""
    text = (
        "# Families of models\n\n"
        "Tiny random models of each family, and what their tests prove: `plan` and `kv`: the written pair computes "
        "the plan; `prune`: so it does without some blocks; `experts`: without some experts, others in each stage; "
        "`heal`: trained weights are written, K and V are the model's; `reload`: plain transformers computes the same "
        "of a stage in both environments; `served`: log-probabilities of a pair of "
        "genuine SGLang workers against the oracle's, with controls told apart; `engine`: an engine is built and its "
        "graph computes the stage. `refused`: a recipe that asks for it gets a sentence with the reason. "
        "An empty cell: not tested.\n\n"
    )
    if not FAMILIES.exists():
        return text + "Not run yet: `make bench-families`."
    return text + tables_families.families(json.loads(FAMILIES.read_text()))


PAGES = {
    "cli.md": commands,
    "recipe.md": lambda: schema(
        "Recipe",
        Recipe,
        "YAML, with `include: [FILE, ...]` of other recipes or parts of them, merged in order. "
        "`pdtrim-deploy recipe schema` prints the same as JSON Schema.",
    ),
    "plan.md": lambda: schema(
        "Plan",
        PDPlan,
        "`plan.json` in the bundle, and the key `pdtrim` in both checkpoints' `config.json`. Its digest is the SHA-256 "
        "of its canonical JSON: sorted keys, no spaces.",
    ),
    "bundle.md": lambda: schema(
        "Bundle",
        Manifest,
        "A folder: `plan.json`, `recipe.yaml`, `prefill/`, `decode/`, `engines/TARGET/STAGE/`, `reports/`, "
        "`manifest.json` and, written last, `COMPLETE` with the manifest's SHA-256. Reports and model cards are not "
        "sealed. This is `manifest.json`.",
    ),
    "metrics.md": metrics,
    "exit-codes.md": exit_codes,
    "families.md": families,
}


def main(folder: Path = ROOT / "docs" / "reference") -> None:
    """Write all pages."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, page in PAGES.items():
        (folder / name).write_text(page() + "\n")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
