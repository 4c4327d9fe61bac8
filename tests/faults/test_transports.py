"""The other transports, where their libraries are installed: the oracle's tokens, and broken connections."""

import subprocess

import pytest
from client import draw, send
from judge import off
from paths import PATHS
from stand import DEADLINE_S

from pdtrim_deploy.plan import KVSend
from pdtrim_deploy.serving.transports import LIBRARIES

pytestmark = [pytest.mark.serve, pytest.mark.faults, pytest.mark.timeout(900)]


@pytest.mark.parametrize("transport", ["nixl", "mooncake"])
def test_transport(start, environment, transport):
    module = LIBRARIES[f"pdtrim_{transport}"].module
    load = {"nixl": "import nixl._api", "mooncake": "import mooncake.engine"}[transport]
    if subprocess.run([environment.python, "-c", load], check=False, capture_output=True, timeout=120).returncode:
        pytest.skip(f"{module} is not installed in {environment.python}; give --serve-python")
    with start(next(iter(PATHS.values())), transport) as stand:
        ended = stand.healthy(21, count=24)
        dense = stand.oracle.with_kv((KVSend(),) * len(stand.oracle.plan.kv))
        long = [outcome for outcome in ended if len(outcome.request.prompt) > 60 and len(outcome.tokens) > 4]
        assert long
        assert any(off(dense, outcome) > 0.01 for outcome in long), "the comparison is blind to a wrong plan"
        stand.verdict("none: a healthy load", ended, 0.0)
        for fault in ("truncate", "corrupt", "drop"):
            with stand.proxy.doing(fault):
                ended = send(stand.url, draw(8, (2, 400), (2, 12), seed=22), DEADLINE_S)
                assert stand.proxy.hits
            assert stand.verdict(f"bytes of header and replies: {fault}", ended).failed
