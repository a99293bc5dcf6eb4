"""Which network interface do ranks on several machines talk over?

gloo listens on the address of the machine's own name. On Debian and its kin that is 127.0.1.1, and on a machine with
several networks it may be one that the others are not on: the run then waits for its peers until a timeout. The
interface by which this rank reaches the head is one that works, since the rendezvous goes over it too.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Mapping, MutableMapping
from typing import Any

import psutil


def choose_interface(environ: MutableMapping[str, str]) -> None:
    """Have gloo use the interface on the way to the head, unless `GLOO_SOCKET_IFNAME` names one already."""
    interface = interface_to_head(environ) if "GLOO_SOCKET_IFNAME" not in environ else None
    if interface is not None:
        environ["GLOO_SOCKET_IFNAME"] = interface


def interface_to_head(environ: Mapping[str, str]) -> str | None:
    """The interface on the way to `MASTER_ADDR`; on the head itself, the one that has this address.

    None where there is no head, where its name does not resolve, or where it is a loopback address, as on one machine.
    """
    if "MASTER_ADDR" not in environ:
        return None
    try:
        family, kind, _, _, address = socket.getaddrinfo(
            environ["MASTER_ADDR"], int(environ.get("MASTER_PORT", "1")), type=socket.SOCK_DGRAM
        )[0]
        with socket.socket(family, kind) as probe:
            probe.connect(address)  # sends nothing, but chooses a route
            own = ipaddress.ip_address(probe.getsockname()[0].partition("%")[0])
    except OSError:
        return None  # whoever connects to the head in earnest has the better error
    if own.is_loopback:
        return None
    interfaces: dict[str, list[Any]] = psutil.net_if_addrs()
    for name, addresses in interfaces.items():
        if any(entry.address.partition("%")[0] == str(own) for entry in addresses):
            return name
    return None
