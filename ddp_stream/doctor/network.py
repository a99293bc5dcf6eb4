"""What this machine's network looks like from one rank: names, addresses, interfaces, ports."""

from __future__ import annotations

import contextlib
import socket
import struct
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ddp_stream.doctor.limits import limited

_RESOLVE_S = 10.0


def gather_network(head: str | None, port: int | None, environ: Mapping[str, str]) -> dict[str, Any]:
    """Addresses and interfaces as JSON values.

    Args:
        head: the name or address where ranks meet; None if there is one rank
        port: its port
        environ: for `GLOO_SOCKET_IFNAME`
    """
    interfaces = own_interfaces()
    by_address = {address: name for name, addresses in interfaces.items() for address in addresses}
    hostname = socket.gethostname()
    host_addresses, host_error = resolve(hostname)
    facts: dict[str, Any] = {
        "hostname": hostname,
        "host_addresses": host_addresses,
        "host_error": host_error,
        "interfaces": interfaces,
        "gloo_named": environ.get("GLOO_SOCKET_IFNAME"),
        "nccl_named": environ.get("NCCL_SOCKET_IFNAME"),
        "head": head,
        "port": port,
        "ephemeral": ephemeral_range(),
    }
    if facts["gloo_named"]:
        name = facts["gloo_named"].split(",")[0]
        facts["gloo"] = [name, next(iter(interfaces.get(name, [])), None)]
    else:  # gloo listens on the address that this machine's own name stands for
        address = host_addresses[0] if host_addresses else "127.0.0.1"
        facts["gloo"] = [by_address.get(address, "lo" if is_loopback(address) else None), address]
    if head is not None:
        facts["head_addresses"], facts["head_error"] = resolve(head)
        facts["head_is_here"] = any(is_here(address) for address in facts["head_addresses"])
        source = source_address(facts["head_addresses"], port or 1)
        facts["route"] = [by_address.get(source or ""), source]
    return facts


def resolve(name: str) -> tuple[list[str], str | None]:
    """The addresses that `name` stands for on this machine, IPv4 first, and the error if it stands for none."""
    try:
        found = limited(
            lambda: socket.getaddrinfo(name, None, type=socket.SOCK_STREAM), _RESOLVE_S, f"resolving {name}"
        )
    except OSError as error:  # TimeoutError is one
        return [], str(error)
    addresses = sorted({str(entry[4][0]) for entry in found}, key=lambda address: (":" in address, address))
    return addresses, None


def is_loopback(address: str) -> bool:
    """Whether `address` reaches only its own machine."""
    return address.startswith("127.") or address in ("::1", "0.0.0.0")


def is_here(address: str) -> bool:
    """Whether `address` belongs to this machine: only then can a socket be bound to it."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.bind((address, 0))
    except OSError:
        return False
    return True


def source_address(targets: list[str], port: int) -> str | None:
    """The address from which packets to the first of `targets` leave this machine; nothing is sent."""
    for target in targets:
        family = socket.AF_INET6 if ":" in target else socket.AF_INET
        with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((target, port))
            return str(probe.getsockname()[0])
    return None


def own_interfaces() -> dict[str, list[str]]:
    """Interfaces that are up, with their IPv4 address (Linux; elsewhere none)."""
    if sys.platform != "linux":
        return {}
    import fcntl

    found: dict[str, list[str]] = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name[:15].encode())
            try:
                flags = struct.unpack("H", fcntl.ioctl(probe, 0x8913, request)[16:18])[0]  # SIOCGIFFLAGS
                if not flags & 1:
                    continue
                found[name] = []
                found[name] = [socket.inet_ntoa(fcntl.ioctl(probe, 0x8915, request)[20:24])]  # SIOCGIFADDR
            except OSError:
                continue
    return found


def ephemeral_range() -> list[int]:
    """The ports that the kernel hands out by itself, first and last."""
    try:
        first, last = Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()
    except (OSError, ValueError):
        return [49152, 65535]
    return [int(first), int(last)]
