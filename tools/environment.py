"""Make the project's environments, `.venv/{build,serve,docs,aiperf,evals}`, from constraints/*.txt.

    python3 tools/environment.py build serve      # what `make setup` runs; aiperf and evals are made when first used

An environment is complete when its stamp, written last, names the pins and the Python it was made from; it is then
left alone. Any other (missing, incomplete, from other pins or another Python) is removed and made again. If only
pyproject.toml changed, the project is installed again, where it is: aiperf and evals hold programs of others alone.
Needs only the standard library and pip.
"""

import argparse
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STAMP = "pdtrim-stamp.json"
RECIPE = "1"  # increase it when this file makes a different environment from the same lock


def has_cuda() -> bool:
    """Whether a GPU can be used here: nvidia-smi exists and lists one."""
    smi = shutil.which("nvidia-smi")
    return bool(smi and "GPU" in subprocess.run([smi, "-L"], check=False, capture_output=True, text=True).stdout)


def run(*command: str | Path) -> None:
    """Run a command and show its output; exit with its code if it fails."""
    print("+", *command, flush=True)
    done = subprocess.run([str(part) for part in command], check=False, cwd=ROOT)
    if done.returncode:
        sys.exit(f"set-up failed (exit code {done.returncode}): {' '.join(map(str, command))}")


def digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


class Environment:
    """One virtual environment and the lock file that says what is in it."""

    def __init__(self, name: str, cuda: bool) -> None:
        self.name, self.cuda = name, cuda
        self.path = ROOT / ".venv" / name
        self.python = self.path / "bin" / "python"
        self.lock = ROOT / "constraints" / f"{name}.txt"
        self.holds_project = name not in ("aiperf", "evals")

    def required(self) -> dict[str, str]:
        """The stamp of a complete environment."""
        machine = "cuda" if self.cuda else "cpu"
        packages = {"packages": digest(self.lock.read_text(), RECIPE, sys.version, machine, str(self.path))}
        if not self.holds_project:
            return packages
        return packages | {"project": digest((ROOT / "pyproject.toml").read_text())}

    def stamped(self) -> dict[str, str]:
        try:
            return json.loads((self.path / STAMP).read_text())
        except (FileNotFoundError, ValueError):
            return {}

    def ensure(self) -> None:
        """Make whatever is missing, and nothing else."""
        required, stamped = self.required(), self.stamped()
        if stamped == required and self.python.exists():
            print(f"{self.name}: stands ({self.path.relative_to(ROOT)})")
            return
        started = time.monotonic()
        (self.path / STAMP).unlink(missing_ok=True)
        if stamped.get("packages") != required["packages"] or not self.python.exists():
            shutil.rmtree(self.path, ignore_errors=True)
            run(sys.executable, "-m", "venv", self.path)
            run(self.python, "-m", "pip", "install", "--quiet", "uv", "-c", self.lock)
            getattr(self, f"install_{self.name}")()
        if self.holds_project:
            self.uv("--no-deps", "--no-build-isolation", "--reinstall-package", "pdtrim-deploy", "-e", ".")
        partial = self.path / (STAMP + ".partial")
        partial.write_text(json.dumps(required))
        partial.rename(self.path / STAMP)
        print(f"{self.name}: made in {time.monotonic() - started:.0f} s ({self.path.relative_to(ROOT)})")

    def uv(self, *arguments: str | Path) -> None:
        # Compiled now: where PYTHONDONTWRITEBYTECODE is set, every start of SGLang would compile all it imports.
        compiled = "--compile-bytecode"
        run(self.python, "-m", "uv", "pip", "install", "--quiet", compiled, "--python", self.python, *arguments)

    def install_build(self) -> None:
        # torch through pip with its dependencies: pip honours the machine's own find-links, where a CPU build
        # may lie (uv does not look there), and a CUDA build names its CUDA libraries exactly.
        torch = next(line for line in self.lock.read_text().splitlines() if line.startswith("torch=="))
        run(self.python, "-m", "pip", "install", "--quiet", torch, "-c", self.lock)
        self.uv("--no-deps", "-r", self.lock)

    def install_docs(self) -> None:
        self.uv("--no-deps", "-r", self.lock)

    def install_aiperf(self) -> None:
        self.uv("--no-deps", "-r", self.lock)

    def install_evals(self) -> None:
        self.uv("--no-deps", "-r", self.lock)

    def install_serve(self) -> None:
        # --no-deps: the lock is complete for a CPU, without the CUDA-only half of SGLang's requirements.
        self.uv("--no-deps", "-r", self.lock)
        if self.cuda:
            self.uv("-c", self.lock, "sglang==0.5.23")
        else:
            site = next(self.path.glob("lib/python3.*/site-packages"))
            (site / "pdtrim_cpu_stubs.pth").write_text(f"{ROOT / 'tools' / 'cpu_stubs'}\n")


def main() -> None:
    """Make the named environments, one process at a time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", choices=["build", "serve", "docs", "aiperf", "evals"])
    names = parser.parse_args().names
    if sys.version_info < (3, 11):  # noqa: UP036 - whoever runs this may have another Python
        version = sys.version.split()[0]
        sys.exit(f"the lock files need Python 3.11 or later, this is {version}: make PYTHON=python3.11 setup")
    os.environ.pop("PYTHONPATH", None)
    try:
        (ROOT / ".venv").mkdir(exist_ok=True)
        with (ROOT / ".venv" / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            for name in dict.fromkeys(names):
                Environment(name, cuda=has_cuda()).ensure()
    except KeyboardInterrupt:
        sys.exit("set-up stopped by Ctrl-C; the same command goes on with the environments that are not made")
    except OSError as error:
        sys.exit(f"set-up failed: {error}; mend that and run the same command again")


if __name__ == "__main__":
    main()
