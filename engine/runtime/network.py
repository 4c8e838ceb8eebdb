"""The network interface that gloo takes between hosts."""

from __future__ import annotations

import ipaddress
import os
import socket
from collections.abc import Mapping
from typing import Any

import psutil

#: Names under which no other host is reached.
_HERE = ("localhost", "127.0.0.1", "::1")


def address_towards(host: str) -> str:
    """The own address from which a host is reached. Nothing is sent.

    Raises:
        OSError: the host has no address, or there is no way to it.
    """
    family, kind, *_, place = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(place)
        return str(probe.getsockname()[0])


def interface_of(address: str) -> str | None:
    """The interface that has an address."""
    for name, found in psutil.net_if_addrs().items():
        if any(one.address.split("%")[0] == address for one in found):
            return str(name)
    return None


def prefer_interface(env: Mapping[str, str], store: Any) -> None:
    """Lets gloo listen where other hosts reach this one, unless GLOO_SOCKET_IFNAME says where.

    Left alone gloo takes the address that the own host name has, on Debian 127.0.1.1. Here it is
    the interface that reaches MASTER_ADDR; on the host where that name is a loopback address
    itself, the interface that reaches a rank of another host, which the store names.

    Args:
        env: as `engine.runtime.rendezvous.resolve` gives it.
        store: torch's, of all ranks.

    Raises:
        OSError: there is no way to the other hosts.
    """
    one_host = env["LOCAL_WORLD_SIZE"] == env["WORLD_SIZE"] or env["MASTER_ADDR"] in _HERE
    if one_host or "GLOO_SOCKET_IFNAME" in env:
        return
    mine = address_towards(env["MASTER_ADDR"])
    if ipaddress.ip_address(mine.split("%")[0]).is_loopback:
        mine = address_towards(store.get("address").decode())
    else:
        store.set("address", mine)
    if name := interface_of(mine):
        os.environ["GLOO_SOCKET_IFNAME"] = name
