"""Who a worker is to the others of its cluster: what it signs with."""

from __future__ import annotations

from typing import Any

from pdtrim_deploy.worker.config import WorkerConfig
from pdtrim_sglang import sglang_host
from pdtrim_sglang.plan_source import read_plan
from pdtrim_sglang.secret import read_secret
from pdtrim_sglang.signature import Signature, SignedRequests
from pdtrim_sglang.transports.handshake import Credentials


def signature_of(server_args: Any) -> Signature:
    """What a worker signs with: its secret, and the digest of its checkpoint's plan (zeros where there is none)."""
    plan = read_plan(server_args.model_path)
    config = WorkerConfig.parse(server_args.json_model_override_args)
    # KV comes in at the one, SGLang's bootstrap server listens at the other
    secret = read_secret(config.secret_file, sglang_host.own_address(), server_args.host)
    return Signature(Credentials(bytes.fromhex(plan.digest) if plan else bytes(32), secret))


def sign_requests(signature: Signature) -> None:
    """From now on whatever SGLang's KV managers, senders and receivers ask over HTTP is signed."""
    sglang_host.ask_by(SignedRequests(signature))
