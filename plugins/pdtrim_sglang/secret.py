"""What makes a worker a member of its cluster: a secret in a file that whoever starts the workers gives to all."""

from __future__ import annotations

import hmac
import ipaddress
import socket
from pathlib import Path

from pdtrim_deploy.worker.config import ARGUMENT, key

SECRET_FILE = key("secret_file")
LEAST_BYTES, MOST_BYTES = 16, 4096


def read_secret(place: str | None, *hosts: str) -> bytes:
    """The cluster's secret, empty when the worker was given none; white space around it does not count.

    Args:
        place: the file that the worker was told of (`WorkerConfig.secret_file`); None: it was told of none.
        hosts: names or addresses at which the worker listens.

    Raises:
        RuntimeError: the file cannot be read, its secret is too short or too long, or there is none though other
            machines can reach the worker.

    """
    if place is None:
        for host in hosts:
            if _reached_from_elsewhere(host):
                raise RuntimeError(
                    f"pdtrim: this worker is reached at {host}, from other machines: give all workers one secret "
                    f'file: openssl rand -hex 32 > FILE, {ARGUMENT} \'{{"{SECRET_FILE}": "FILE"}}\''
                )
        return b""
    try:
        with Path(place).open("rb") as file:
            secret = file.read(MOST_BYTES + 1).strip()
    except OSError as error:
        raise RuntimeError(f"pdtrim: {SECRET_FILE} {place} cannot be read: {error.strerror}") from None
    if not LEAST_BYTES <= len(secret) <= MOST_BYTES:
        raise RuntimeError(
            f"pdtrim: {SECRET_FILE} {place} holds {len(secret)} bytes, allowed: {LEAST_BYTES} to {MOST_BYTES}; make "
            f"one with: openssl rand -hex 32 > {place}"
        )
    return secret


def _reached_from_elsewhere(host: str) -> bool:
    try:
        addresses = socket.getaddrinfo(host.strip("[]") or "0.0.0.0", None)
    except (OSError, UnicodeError):
        raise RuntimeError(
            f"pdtrim: {host} is neither an address nor a host name known here: give --host and SGLANG_HOST_IP an IP "
            "address of this machine"
        ) from None
    return not all(ipaddress.ip_address(address[0]).is_loopback for *_, address in addresses)


def derive(secret: bytes, purpose: bytes) -> bytes:
    """32 bytes for one purpose, which tell nothing of the secret or of other purposes' (HMAC-SHA256)."""
    return hmac.digest(secret, b"pdtrim 1: " + purpose, "sha256")
