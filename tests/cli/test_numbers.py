"""Invalid numbers, and numbers above what clocks, ports and memory allow: a usage error before any work."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from bare_bundle import make_bundle
from commandline import run

URL, HUGE = "http://127.0.0.1:1", str(10**30)
SERVE = ("serve", "BUNDLE", "--serve-python", sys.executable, "--dry-run")
RENDER = ("deploy", "render", "BUNDLE", "--to", "compose", "--bundle-from", "host:/srv/b", "--dry-run")
LOADTEST = ("loadtest", URL, "--dry-run")
BUILD = ("build", "gone.yaml", "--out", "x", "--dry-run")
SIMULATE = ("plan", "llama-3.1-8b", "--rates", "gone.yaml", "--rate", "1", "--simulate")


@pytest.mark.parametrize(
    ("command", "option", "value"),
    [
        *((SERVE, "--start-timeout", value) for value in ("nan", "inf", "1e300")),
        *((SERVE, option, "100000") for option in ("--prefill", "--decode")),
        *((RENDER, option, HUGE) for option in ("--prefill", "--decode", "--tp-prefill", "--tp-decode", "--page-size")),
        *((LOADTEST, "--deadline", value) for value in ("nan", "inf", "1e300")),
        *((LOADTEST, option, HUGE) for option in ("--requests", "--concurrency", "--warmup", "--prompt-tokens")),
        (LOADTEST, "--output-tokens", "9" * 5000),
        (("fidelity", "BUNDLE", URL, "--dry-run"), "--deadline", "nan"),
        (("inspect", "hf:gone"), "--threshold", "nan"),
        *((BUILD, "--worker-gpus", value) for value in ("nan", "inf", "1e300")),
        (BUILD, "--workers", "100000"),
        (SIMULATE, "--requests", "1000000000"),
        (SIMULATE, "--slo-ttft", "9" * 400 + "s"),
        (("compare", URL, "http://127.0.0.1:2", "--dry-run"), "--rounds", HUGE),
        (("demo", "gone.yaml", "--out", "x"), "--requests", HUGE),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else value[:12],
)
def test_no_such_number(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, command: tuple[str, ...], option: str, value: str
) -> None:
    bundle = make_bundle(tmp_path / "b").path
    code, out, err = run(capsys, *(bundle if word == "BUNDLE" else word for word in (*command, option, value)))
    assert (code, out) == (2, "")
    assert f"Error: Invalid value for '{option}': " in err
