"""NIXL over UCX (shared memory, TCP, RoCE, InfiniBand): the wheels `nixl` and `nixl-cu13` or `nixl-cu12`, whichever
CUDA the serve environment's torch is built for; extra `transport-nixl`. No GPU needed.

UCX listens on every network device, asks nobody for a name and writes where it is told to. On loopback it is kept to
the loopback device; elsewhere it needs a network of its own, which the user says is so (`accept_unauthenticated`).
"""

from __future__ import annotations

import ipaddress
import json
import os
import secrets
import threading
import time
from functools import cache
from typing import Any

from torch import Tensor

from pdtrim_sglang.transports.base import TransportConfig, missing, refuse_strangers
from pdtrim_sglang.transports.one_sided import Writer

POLL_S = 20e-6
PACKAGES = "nixl==1.5.1 nixl-cu13==1.5.1"


class NixlWriter(Writer):
    """One NIXL agent. Its calls are not thread-safe: they take turns, and a write under way does not keep its turn."""

    def __init__(self, loopback: bool, devices: str) -> None:
        try:
            from nixl._api import nixl_agent, nixl_agent_config
        except ImportError as error:
            raise missing("nixl", PACKAGES, error) from None
        if loopback:
            os.environ.setdefault("UCX_NET_DEVICES", "lo")  # UCX reads nothing else
        super().__init__()
        self._agent = nixl_agent(f"pdtrim-{secrets.token_hex(8)}", nixl_agent_config(backends=[]))
        self._agent.create_backend("UCX", _backend_options(devices))
        self._lock = threading.Lock()

    def register(self, buffer: Tensor) -> None:
        with self._lock:
            kind, number = _memory(buffer)
            self._agent.register_memory([(buffer.data_ptr(), len(buffer), number, "")], kind)

    def place(self, buffer: Tensor) -> bytes:
        with self._lock:
            agent = self._agent.get_agent_metadata()
        kind, number = _memory(buffer)
        place = {"address": buffer.data_ptr(), "size": len(buffer), "kind": kind, "device": number}
        return json.dumps(place | {"agent": agent.hex()}).encode()

    def reach(self, place: bytes) -> Any:
        fields = json.loads(place)
        memory = str(fields["kind"]), int(fields["device"])
        with self._lock:
            try:
                name = self._agent.add_remote_agent(bytes.fromhex(fields["agent"]))
            except Exception as error:  # NIXL's own classes, one for each status
                raise OSError(f"NIXL does not understand the decode worker: {error}") from None
        name = name.decode() if isinstance(name, bytes) else name
        return name, int(fields["address"]), int(fields["size"]), memory

    def write(self, source: Tensor, size: int, target: Any, seconds: float) -> None:
        agent, address, room, (there, number) = target
        if size > room:
            raise OSError(
                f"chunk of {size} bytes, the decode worker's staging buffer has {room}: use one staging_bytes"
            )
        deadline, handle = time.monotonic() + seconds, None
        try:
            with self._lock:
                here, device = _memory(source)
                local = self._agent.get_xfer_descs([(source.data_ptr(), size, device)], here)
                remote = self._agent.get_xfer_descs([(address, size, number)], there)
                handle = self._agent.initialize_xfer("WRITE", local, remote, agent, b"")
                state = self._agent.transfer(handle)
            while state == "PROC":
                if time.monotonic() > deadline:
                    raise OSError(f"NIXL did not write within {seconds:.0f} s")
                time.sleep(POLL_S)
                with self._lock:
                    state = self._agent.check_xfer_state(handle)
        except (OSError, AttributeError, LookupError, TypeError):  # the last three are our own
            raise
        except Exception as error:
            raise OSError(f"NIXL: {error}") from None
        finally:
            if handle is not None:
                with self._lock:
                    self._agent.release_xfer_handle(handle)
        if state != "DONE":
            raise OSError(f"NIXL ended a write with {state}")


def _memory(buffer: Tensor) -> tuple[str, int]:
    """NIXL's kind of the memory of `buffer`, and the number of its device."""
    return ("DRAM", 0) if buffer.is_cpu else ("VRAM", buffer.device.index or 0)


@cache
def _writer(role: str, loopback: bool, devices: str) -> NixlWriter:
    """One agent a process and role: UCX's resources are the process's."""
    return NixlWriter(loopback, devices)


def _backend_options(devices: str) -> dict[str, str]:
    """Of NIXL's UCX backend, which takes names alone, and adds port 1; with UCX_NET_DEVICES that variable decides."""
    names = [name.strip() for name in devices.split(",") if name.strip()]
    if not names or os.environ.get("UCX_NET_DEVICES"):
        return {}
    if with_port := [name for name in names if ":" in name]:
        raise RuntimeError(
            f"pdtrim: transport nixl takes network devices without a port, such as mlx5_0, not {with_port[0]}: mend "
            "--disaggregation-ib-device or devices of pdtrim_transport"
        )
    return {"device_list": ", ".join(names)}  # NIXL parts them at a comma and a space


def nixl_writer(role: str, host: str, config: TransportConfig) -> NixlWriter:
    """The writer of a role (`send`, `receive`); RuntimeError, one sentence, when NIXL cannot be used here."""
    loopback = ipaddress.ip_address(host).is_loopback
    if not loopback:
        refuse_strangers("nixl", "UCX", config)
    return _writer(role, loopback, config.devices)
