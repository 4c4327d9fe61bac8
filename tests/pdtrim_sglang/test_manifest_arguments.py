"""SGLang's and the router's own parsers take the arguments that the manifests give them."""

import argparse

import pytest

pytest.importorskip("sglang", reason="needs the serve environment")

from pdtrim_deploy.manifests import BundleAt, Options, Served, compose, kubernetes

SERVED = Served("m", "ab" * 32, "bfloat16", sparse=True)
OPTIONS = Options(prefill=2, tp_prefill=4, tp_decode=2, bundle=BundleAt("host", "/srv/b"))


def commands() -> dict[str, list[str]]:
    files = kubernetes(SERVED, OPTIONS)
    by_name = {
        document["metadata"]["name"]: document["spec"]["template"]["spec"]["containers"][0]["command"]
        for documents in files.values()
        for document in documents
        if document["kind"] == "Deployment"
    }
    return by_name | {name: service["command"] for name, service in compose(SERVED, OPTIONS)["services"].items()}


@pytest.mark.parametrize("name", ["pdtrim-prefill", "pdtrim-decode", "prefill-1", "decode-0"])
def test_of_workers(name):
    from sglang.srt.plugins import load_plugins
    from sglang.srt.server_args import ServerArgs

    load_plugins()
    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    command = commands()[name]
    assert command[:3] == ["python3", "-m", "sglang.launch_server"]
    args = parser.parse_args(command[3:])
    assert args.disaggregation_mode == name.split("-")[0 if name[-1].isdigit() else 1]
    assert args.disaggregation_transfer_backend == "pdtrim_tcp"
    assert args.tp_size == (4 if args.disaggregation_mode == "prefill" else 2)
    assert args.enable_metrics
    assert (args.attention_backend == "triton") == ("decode" in name)


@pytest.mark.parametrize("name", ["pdtrim-router", "router"])
def test_of_the_router(name):
    from sglang_router.launch_router import parse_router_args

    command = commands()[name]
    assert command[:3] == ["python3", "-m", "sglang_router.launch_router"]
    args = parse_router_args(command[3:])
    assert args.pd_disaggregation
    assert args.port == 8000
    assert args.disable_circuit_breaker
    assert args.health_check_timeout_secs > 20  # SGLang's /health takes as long to say no
    if name == "router":
        assert args.prefill_urls == [("http://prefill-0:30000", 8998), ("http://prefill-1:30000", 8998)]
        assert args.decode_urls == ["http://decode-0:30000"]
    else:
        assert args.service_discovery
        assert args.prefill_selector["pdtrim/role"] == "prefill"
        assert args.decode_selector["pdtrim/plan"] == ("ab" * 32)[:32]
        assert args.bootstrap_port_annotation == "sglang.ai/bootstrap-port"
