"""How SGLang's bootstrap server knows who asks: every request carries an HMAC under the cluster's secret.

    X-PDTrim-Signature: HMAC(key, method NUL target NUL plan digest, body)

What changes the server is signed with the plan's digest. What only reads is signed with zeros in its place, so that a
decode worker of another plan gets as far as to be told what is wrong.
"""

from __future__ import annotations

import hmac
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

from pdtrim_sglang.secret import derive
from pdtrim_sglang.transports.handshake import Credentials

HEADER = "X-PDTrim-Signature"


@dataclass(frozen=True)
class Signature:
    """Signs what a worker asks, as the `auth` of `requests`, and checks what it is asked."""

    credentials: Credentials

    @cached_property
    def _key(self) -> bytes:
        return derive(self.credentials.secret, b"bootstrap")

    def of(self, method: str, target: str, body: bytes) -> str:
        """The header's value; `target` is path and query."""
        reads = method == "GET" or target == "/query_dp_ranks"
        digest = bytes(32) if reads else self.credentials.digest
        return hmac.digest(self._key, b"\0".join((method.encode(), target.encode(), digest + body)), "sha256").hex()

    def matches(self, signature: str, method: str, target: str, body: bytes) -> bool:
        """Whether a member asks this."""
        return hmac.compare_digest(signature.encode(errors="replace"), self.of(method, target, body).encode())

    def __call__(self, request: Any) -> Any:
        """Sign a prepared request of `requests`."""
        request.headers[HEADER] = self.of(request.method, request.path_url, request.body or b"")
        return request


class SignedRequests:
    """What SGLang's disaggregation/common/conn.py uses of the module `requests`."""

    def __init__(self, signature: Signature) -> None:
        import requests  # of SGLang's own dependencies

        self._requests, self._signature, self.adapters = requests, signature, requests.adapters
        self.get, self.put, self.post = (
            partial(ask, auth=signature) for ask in (requests.get, requests.put, requests.post)
        )

    def Session(self) -> Any:
        """A session that signs."""
        session = self._requests.Session()
        session.auth = self._signature
        return session
