"""What a worker is told: written by one side, read by the other, refused in one sentence."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from pdtrim_deploy.worker.config import EngineConfig, WorkerConfig, key
from pdtrim_deploy.worker.decode_pool import SplitPool
from pdtrim_deploy.worker.transport import TransportOptions

FULL = WorkerConfig(
    secret_file="/run/secret",
    transport=TransportOptions.model_validate({"stall_seconds": 3, "port": 5000}),
    decode_pool=SplitPool(isl=40, osl=8),
    send_by_layer=True,
    engine=EngineConfig(executor="onnxruntime", path="/engines/decode", stage="decode"),
)


@pytest.mark.parametrize("config", [WorkerConfig(), WorkerConfig(secret_file="x"), FULL])
def test_what_is_written_is_read(config: WorkerConfig) -> None:
    override = json.loads(json.dumps(config.override()))
    assert WorkerConfig.parse(json.dumps(override | {"architectures": ["Other"]})) == config
    assert WorkerConfig.of_model(SimpleNamespace(**override, hidden_size=64, pdtrim={"version": 1})) == config


def test_nothing_is_said_of_defaults() -> None:
    assert WorkerConfig().override() == {}
    assert WorkerConfig.parse("") == WorkerConfig.parse("{}") == WorkerConfig()
    assert set(FULL.override()) == set(map(key, WorkerConfig.model_fields))


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ({"pdtrim_transport": {"stall": 3}}, r"pdtrim_transport\.stall in --json.*; valid: accept_unauth.*, announce"),
        (
            {"pdtrim_decode_pool": {"isl": 4}},
            r"pdtrim_decode_pool\.osl in .*: Field required; valid: isl, osl;",
        ),
        ({"pdtrim_engine": {"executor": "x", "path": "p", "stage": "both"}}, r"pdtrim_engine\.stage in .*serve$"),
        ({"pdtrim_secret": "x"}, r"pdtrim_secret in .*; valid: pdtrim_decode_pool, pdtrim_engine, pdtrim_secret_file"),
        ({"pdtrim_secret_file": 3}, r"pdtrim_secret_file in .*valid string"),
    ],
)
def test_what_is_not_valid_is_refused_in_one_sentence(override: dict[str, object], sentence: str) -> None:
    with pytest.raises(RuntimeError, match=sentence) as refused:
        WorkerConfig.parse(json.dumps(override))
    assert "\n" not in str(refused.value)
