"""What a user waits for: time between tokens beside SGLang alone, and TTFT beside SGLang's own transfer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

from pdtrim_deploy.bundle import Bundle
from pdtrim_deploy.gpucheck import tiny
from pdtrim_deploy.gpucheck.bundles import CUT, lazily
from pdtrim_deploy.gpucheck.checks import Check, Figure
from pdtrim_deploy.gpucheck.pair import PAIR_S, Loads, Pair, itl, measured
from pdtrim_deploy.gpucheck.stock import STOCK_S, stock_server
from pdtrim_deploy.loadtest import Scenario

CLIENTS = (1, 16)
WIDE = tiny.Size(16, 1024, 4096, 16, 8)  # 0.25 billion parameters: large enough that a step is not all launches


def itl_checks(serve: Path, folder: Path, pair: Pair | None = None) -> list[Check]:
    """Time between tokens of one model: under a plan that cuts every layer, a dense plan, and SGLang without us."""
    loads = {n: Scenario.closed(4 * n, n, (256, 256), (64, 64), warmup=2, deadline_s=120) for n in CLIENTS}
    cut, dense = (lazily(folder / kv["method"], kv, WIDE, pruning={}) for kv in (CUT, {"method": "none"}))
    pair = pair or Pair(serve)
    return [
        Check("ITL: cut plan", partial(_itl, pair, cut, loads), PAIR_S),
        Check("ITL: dense plan", partial(_itl, pair, dense, loads), PAIR_S),
        Check("ITL: SGLang alone, dense", partial(_stock_itl, pair, dense, loads), STOCK_S),
    ]


def nixl_checks(serve: Path, folder: Path, pair: Pair | None = None) -> list[Check]:
    """TTFT of long prompts by our transfer beside SGLang's own NIXL."""
    return _transfer_checks(folder, pair or Pair(serve), "nixl")


def mooncake_checks(serve: Path, folder: Path, pair: Pair | None = None) -> list[Check]:
    """TTFT of long prompts by our transfer beside SGLang's own Mooncake."""
    return _transfer_checks(folder, pair or Pair(serve), "mooncake")


def _transfer_checks(folder: Path, pair: Pair, library: str) -> list[Check]:
    dense = lazily(folder / "dense", {"method": "none"}, WIDE)
    k4v3 = lazily(folder / "k4v3", {"method": "none", "wire_dtype": "k4v3"}, WIDE)
    load = Scenario.closed(16, 1, (3000, 3000), (2, 2), warmup=2, deadline_s=120)
    ours = replace(pair, backend=f"pdtrim_{library}")
    variants: Mapping[str, tuple[Callable[[], Bundle], Pair]] = {
        f"stock {library}": (dense, replace(pair, backend=library)),
        **{
            f"pdtrim_{library}, k4v3, {slots} slots": (
                k4v3, replace(ours, transport={"accept_unauthenticated": True, "slots": slots}),
            )
            for slots in (("device", "host") if pair.device == "cuda" else ("host",))
        },
        "pdtrim_tcp, k4v3": (k4v3, pair),
    }  # fmt: skip
    return [
        Check(f"{library}: 3,000 tokens by {name}", partial(_ttft, variant, bundle, load), PAIR_S)
        for name, (bundle, variant) in variants.items()
    ]


def _itl(pair: Pair, bundle: Callable[[], Bundle], loads: Loads) -> Figure:
    with pair.of(bundle()) as cluster:
        return itl(measured(cluster, loads))


def _stock_itl(pair: Pair, bundle: Callable[[], Bundle], loads: Loads) -> Figure:
    with stock_server(pair, bundle()) as server:
        return itl(measured(server, loads))


def _ttft(pair: Pair, bundle: Callable[[], Bundle], load: Scenario) -> Figure:
    with pair.of(bundle()) as cluster:
        return {"ttft_ms": measured(cluster, {1: load})[1].ttft_ms.p50 or -1.0}
