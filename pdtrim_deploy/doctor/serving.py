"""The serve environment, checked in its own Python: SGLang, every hook target, kernels, router, transports."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pdtrim_deploy.doctor.base import CheckContext, Finding, Job, Status
from pdtrim_deploy.doctor.packages import wanted_version
from pdtrim_deploy.errors import UserError
from pdtrim_deploy.local.job import last_line
from pdtrim_deploy.serving.commands import FOREIGN
from pdtrim_deploy.serving.environment import REPO, ServeEnvironment, gpu_count
from pdtrim_deploy.serving.transports import LIBRARIES

DIAGNOSIS = ("-P", "-m", "pdtrim_sglang.diagnosis")  # -P: import no module of the current folder


@dataclass(frozen=True)
class SGLang:
    """SGLang's Python, and what the plugin finds in it."""

    jobs: tuple[Job, ...] = ("serve", "demo")

    def look(self, context: CheckContext) -> Iterable[Finding]:
        """One finding per thing; a single one if there is no such Python, or it lacks the plugin."""
        try:
            python = ServeEnvironment.find(context.serve_python).python
        except UserError as error:
            yield self._line("environment", "missing", str(error), _mend(None))
            return
        try:
            report = diagnosis(python, context.deep)
        except UserError as error:
            yield self._line("plugin", "missing", str(error), _mend(python))
            return
        yield self._line("environment", "ok", f"{python}, Python {report['python']}")
        yield from self._packages(report["packages"], python)
        yield from self._kernels(report["kernels"])
        yield from self._plugin(report, python)
        for name, libraries in report["transports"].items():
            detail = "all it needs is there" if not libraries else f"optional; not found: {', '.join(libraries)}"
            shared = [f"{lib}1" for lib in libraries if lib.startswith("lib")]
            package = LIBRARIES.get(f"pdtrim_{name}") if len(shared) < len(libraries) else None
            mends = [f"apt-get install {' '.join(shared)}"] if shared else []
            mends += [f"{python} -m pip install --no-deps {package.package}"] if package else []
            yield Finding(
                group="serve",
                name=f"transport {name}",
                status="missing" if libraries else "ok",
                detail=detail,
                mend=" && ".join(mends) or None,
            )
        yield self._line("decode attention", "ok", f"under a sparse plan: {', '.join(report['sparse_backends'])}")

    def _packages(self, has: dict[str, str | None], python: Path) -> Iterator[Finding]:
        for name in ("sglang", "sglang-router", "torch", "transformers", "onnxruntime", "tensorrt"):
            required, version = wanted_version(name, "serve")[0], has[name]
            good = version is not None and required in (None, version.partition("+")[0])
            optional = {"onnxruntime": "executor onnxruntime", "tensorrt": "executor tensorrt, on a GPU"}.get(name)
            yield Finding(
                group="serve",
                name=name,
                status="ok" if good else "wrong version" if version else "missing",
                detail=(version or "not installed")
                + (f", wanted {required}" if version and not good else "")
                + (f" ({optional})" if optional else ""),
                mend=None if good else f"{python} -m pip install tensorrt" if name == "tensorrt" else _mend(python),
                # torch and transformers are SGLang's own pins: its image may have another build of them.
                needed_by=() if optional or (version and not good and "sglang" not in name) else self.jobs,
            )

    def _kernels(self, kernels: str | None) -> Iterator[Finding]:
        gpu = gpu_count() > 0
        good = kernels == "package" or (kernels == "stub" and not gpu)
        description = {"stub": "a stub whose functions raise, for CPUs", "package": "installed", None: "not installed"}[
            kernels
        ]
        yield self._line(
            "sgl_kernel", "ok" if good else "missing", description, None if good else "make distclean setup"
        )

    def _plugin(self, report: dict[str, Any], python: Path) -> Iterator[Finding]:
        good = report["plugin"]
        detail = "registered with SGLang" if good else "no entry point in sglang.srt.plugins"
        yield self._line("plugin", "ok" if good else "missing", detail, None if good else _mend(python))
        mend = f"{python} -m pip install sglang=={report['read_against']}"
        for target, stands in report["targets"].items():
            short = target.removeprefix("sglang.srt.")
            yield self._line(
                f"hook {short.rpartition('.')[2]}",
                "ok" if stands else "wrong version",
                short
                if stands
                else f"{short} is not in this SGLang; the plugin is written for {report['read_against']}",
                None if stands else mend,
            )
        gone = [name for name, stands in report["imports"].items() if not stands]
        yield self._line(
            "imports from SGLang",
            "wrong version" if gone else "ok",
            f"not there: {', '.join(gone)}" if gone else f"all {len(report['imports'])} names exist",
            mend if gone else None,
        )
        if "deep" in report:
            failed = report["deep"]
            detail = failed or "loaded into SGLang, every hook installed"
            yield self._line("plugin loaded", "wrong version" if failed else "ok", detail, mend if failed else None)

    def _line(self, name: str, status: Status, detail: str, mend: str | None = None) -> Finding:
        return Finding(group="serve", name=name, status=status, detail=detail, mend=mend, needed_by=self.jobs)


def diagnosis(python: Path, deep: bool = False) -> dict[str, Any]:
    """Output of `pdtrim_sglang.diagnosis` in another Python; UserError when it does not run there."""
    chosen = {"SGLANG_PLUGINS": "pdtrim", "HF_HUB_OFFLINE": "1"} | (
        {} if gpu_count() else {"SGLANG_USE_CPU_ENGINE": "1"}
    )
    environment = {name: value for name, value in os.environ.items() if name not in FOREIGN} | chosen
    command = [str(python), *DIAGNOSIS, *(["--deep"] if deep else [])]
    why = f"pdtrim_sglang.diagnosis does not run in {python}"
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", check=False, timeout=300, env=environment
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UserError(f"{why}: {error}") from None
    try:
        report = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        report = None
    if not isinstance(report, dict):
        raise UserError(f"{why}: {last_line(done.stderr)}")
    return report


def _mend(python: Path | None) -> str:
    if (REPO / "Makefile").is_file():
        return "make setup"
    return f"{python or 'ANOTHER_PYTHON'} -m pip install 'pdtrim-deploy[serve]'"
