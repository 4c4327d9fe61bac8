"""The results about a bundle: the JSON files of its build, evaluation and load tests."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pdtrim_deploy.bundle import Bundle
from pdtrim_deploy.errors import UserError
from pdtrim_deploy.recipe.kv import FIXED_KV
from pdtrim_deploy.report.html.fault_table import KEYS as FAULT_KEYS

# Report of a bundle -> the command that makes it.
REPORTS = {
    **dict.fromkeys(
        ("pruning", "target", "kv", "candidates", "attention", "healing", "healing-kv"),
        "pdtrim-deploy build BUNDLE/recipe.yaml --out BUNDLE",
    ),
    "eval": "pdtrim-deploy eval BUNDLE",
    "tasks": "pdtrim-deploy eval BUNDLE --tasks perplexity,choice,needle,agreement",
    "fidelity": "pdtrim-deploy fidelity BUNDLE",
    "metrics": "pdtrim-deploy demo RECIPE --out DIR",
    "sizing": "pdtrim-deploy plan BUNDLE --rates FILE --rate N --slo-ttft TIME --slo-itl TIME --simulate --json "
    "> BUNDLE/reports/sizing.json",
    "compare": "pdtrim-deploy compare A BUNDLE --out BUNDLE/reports/compare.json",
}


@dataclass(frozen=True)
class Findings:
    """All data of a page.

    Attributes:
        reports: parsed JSON by name (REPORTS), as far as the bundle has them.
        comparisons: JSON of `compare`, by file name.
        pareto: rows and environment of `make bench-kv`, if given.
        faults: rows and environment of `make bench-faults`, if given or among the bundle's reports (faults.json).

    """

    bundle: Bundle
    reports: dict[str, Any]
    comparisons: dict[str, Any] = field(default_factory=dict)
    pareto: dict[str, Any] | None = None
    faults: dict[str, Any] | None = None

    @classmethod
    def of(
        cls,
        bundle: Bundle,
        comparisons: Sequence[Path] = (),
        pareto: Path | None = None,
        faults: Path | None = None,
    ) -> Findings:
        """Read all reports that exist.

        Raises:
            UserError: a file is missing or not JSON, or a report is of another plan.

        """
        reports = {name: _read(path) for name in REPORTS if (path := bundle.reports_dir / f"{name}.json").is_file()}
        for name, report in reports.items():
            plan = report.get("plan_digest") or report.get("plan")
            digest = plan.get("digest") if isinstance(plan, dict) else plan
            if digest not in (None, bundle.plan.digest):
                command = _about(bundle, REPORTS[name])
                raise UserError(
                    f"{bundle.reports_dir / name}.json is of plan {digest[:12]}, the bundle's is "
                    f"{bundle.plan.digest[:12]}; run again: {command}"
                )
        loads = {"compare.json": reports.pop("compare")} if "compare" in reports else {}
        loads |= {str(path): _read(path) for path in comparisons}
        for name, report in loads.items():
            if not {"first", "second", "ratios", "load"} <= report.keys():
                raise UserError(f"{name} is not a comparison; make one with: pdtrim-deploy compare A B --out {name}")
        own = bundle.reports_dir / "faults.json"
        faults = faults or (own if own.is_file() else None)
        tried = read_faults(faults) if faults else None
        return cls(bundle, reports, loads, read_pareto(pareto) if pareto else None, tried)

    @property
    def built(self) -> dict[str, Any]:
        """Environment of the build (`bundle.environment`), with the command that builds the bundle again."""
        command, manifest = _about(self.bundle, REPORTS["pruning"]), self.bundle.manifest
        return {"environment": {"command": command, "machine": manifest.machine, "versions": manifest.versions}}

    @property
    def missing(self) -> dict[str, str]:
        """Missing reports, and the command that makes each."""
        recipe = self.bundle.recipe
        idle = {
            "compare",
            *(() if recipe.pruning.decode_loses else ("candidates",)),
            *(("attention",) if recipe.kv.method in FIXED_KV else ()),
            *("healing", "healing-kv", "target"),  # where they were asked for the build left them
        }
        lacks = {n: c for n, c in REPORTS.items() if n not in self.reports and n not in idle}
        if not self.comparisons and not self.reports.get("metrics"):
            lacks["compare"] = REPORTS["compare"]
        if self.pareto is None:
            lacks["pareto"] = "make bench-kv, then report --pareto benchmarks/results/kv.json"
        if self.faults is None:
            lacks["faults"] = "make bench-faults, then report --faults benchmarks/results/faults.json"
        return {name: _about(self.bundle, command) for name, command in lacks.items()}


def _about(bundle: Bundle, command: str) -> str:
    return command.replace("BUNDLE", shlex.quote(str(bundle.path)))


def read_pareto(path: Path) -> dict[str, Any]:
    """Results of `make bench-kv`; UserError when the file is something else."""
    results = _read(path)
    if not _has_rows(results, {"method", "asked", "reduction", "ppl_ratio"}):
        raise UserError(f"{path} has no rows of bench-kv; make it with: make bench-kv")
    return results


def read_faults(path: Path) -> dict[str, Any]:
    """Results of `make bench-faults`; UserError when the file is something else."""
    results = _read(path)
    if not _has_rows(results, FAULT_KEYS):
        raise UserError(f"{path} has no rows of bench-faults; make it with: make bench-faults")
    return results


def _has_rows(results: dict[str, Any], keys: set[str]) -> bool:
    rows = results.get("rows")
    return isinstance(rows, list) and bool(rows) and all(isinstance(row, dict) and keys <= row.keys() for row in rows)


def _read(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; check the path") from None
    except IsADirectoryError:
        raise UserError(f"{path}: a folder; name the JSON file in it") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({error}); make it again") from None
    if not isinstance(data, dict):
        raise UserError(f"{path}: not a report; make it again")
    return data
