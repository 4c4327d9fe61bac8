"""Programs on PATH, and the GPU."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from pdtrim_deploy.doctor.base import ALL, CheckContext, Finding, Job
from pdtrim_deploy.local.compute import MEND
from pdtrim_deploy.serving.environment import REPO

AIPERF = (
    "0.13.0"  # the version that its driver needs (loadtest.aiperf.environment, which imports more than a check may)
)


@dataclass(frozen=True)
class Program:
    """An optional program. `version`: arguments that make it print its version; `why`: what it is for."""

    name: str
    why: str
    mend: str
    version: tuple[str, ...] = ("--version",)
    jobs: tuple[Job, ...] = ALL

    def look(self, context: CheckContext) -> Iterable[Finding]:
        """One line."""
        path = shutil.which(self.name)
        yield Finding(
            group="tools",
            name=self.name,
            status="ok" if path else "missing",
            detail=f"{_version(path, self.version) if path else 'not on PATH'} ({self.why})",
            mend=None if path else self.mend,
        )


@dataclass(frozen=True)
class Aiperf:
    """The second load generator, searched like its driver does: `.venv/aiperf` of the clone or here, else PATH."""

    jobs: tuple[Job, ...] = ("serve", "demo")

    def look(self, context: CheckContext) -> Iterable[Finding]:
        """One finding. The version comes from its metadata, because the program takes seconds to print it."""
        places = [folder / ".venv" / "aiperf" for folder in (REPO, Path.cwd())]
        known = [file for place in places for file in place.glob("lib/python*/site-packages/aiperf-*.dist-info")]
        on_path = shutil.which("aiperf")
        version = known[0].name.split("-")[1].removesuffix(".dist") if known else None
        if version is None and on_path:
            version = _output([on_path, "--version"]).strip() or "of no version"
        good = version == AIPERF
        pip = f"python3 -m venv .venv/aiperf && .venv/aiperf/bin/pip install aiperf=={AIPERF}"
        yield Finding(
            group="tools",
            name="aiperf",
            status="ok" if good else "wrong version" if version else "missing",
            detail=(version or "no environment of its own, and not on PATH")
            + (f", wanted {AIPERF}" if version and not good else "")
            + " (loadtest --driver aiperf)",
            mend=None if good else "make setup-aiperf" if (REPO / "Makefile").is_file() else pip,
        )


@dataclass(frozen=True)
class Device:
    """Whether the GPUs that `--device` names are here."""

    jobs: tuple[Job, ...] = ("build", "eval", "demo")

    def look(self, context: CheckContext) -> Iterable[Finding]:
        """One line where a GPU is not."""
        if lack := context.compute.lack:
            yield Finding(
                group="machine", name="--device", status="missing", detail=lack, mend=MEND, needed_by=self.jobs
            )


@dataclass(frozen=True)
class Gpu:
    """The NVIDIA GPUs that nvidia-smi lists, with driver and memory."""

    jobs: tuple[Job, ...] = ALL

    def look(self, context: CheckContext) -> Iterable[Finding]:
        """One finding per GPU, or one that says there is none."""
        smi, listed = shutil.which("nvidia-smi"), ""
        if smi:
            query = [smi, "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
            listed = _output(query)
        for number, line in enumerate(listed.splitlines()):
            yield Finding(group="machine", name=f"gpu {number}", status="ok", detail=line.strip())
        if not listed.strip():
            yield Finding(
                group="machine",
                name="gpu",
                status="missing",
                detail="no NVIDIA GPU found: SGLang is served on the CPU, TensorRT engines cannot run",
                mend="install NVIDIA's driver where there is a GPU; nvidia-smi must list it",
            )


def _version(path: str, arguments: tuple[str, ...]) -> str:
    """The first line of the program's output with a version number such as 13.1."""
    numbered = [line for line in _output([path, *arguments]).splitlines() if re.search(r"\d\.\d", line)]
    return numbered[0].strip() if numbered else path


def _output(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""
