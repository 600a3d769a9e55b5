"""Which of this machine's addresses and interfaces lead to another machine. No packet is sent."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterable
from contextlib import suppress

import psutil

ANYWHERE = "192.0.2.1"
"""An address that nobody has (RFC 5737): the kernel would send to it by the default route."""


def free_port() -> int:
    """A TCP port that is free on this machine now, on all its addresses."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def resolve(host: str) -> str | None:
    """The first address of a host; None when its name is unknown here."""
    with suppress(OSError, UnicodeError):  # UnicodeError: what cannot be a host name
        return str(socket.getaddrinfo(host, None)[0][4][0])
    return None


def is_loopback(address: str) -> bool:
    return ipaddress.ip_address(_bare(address)).is_loopback


def address_towards(hosts: Iterable[str]) -> str | None:
    """This machine's address on the way to the first of ``hosts`` that is not reached by loopback; None if all are.

    The way to an own address is that address itself, so on rank 0's node this finds the address that the others know.
    """
    for host in hosts:
        with suppress(OSError, UnicodeError):
            family, kind, _, _, target = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
            with socket.socket(family, kind) as probe:
                probe.connect(target)  # of a datagram socket: sends nothing, but chooses the route
                address = str(probe.getsockname()[0])
            if not is_loopback(address):
                return address
    return None


def interface_of(address: str) -> str | None:
    """The network interface that owns an address."""
    for name, entries in psutil.net_if_addrs().items():
        if any(_bare(entry.address) == _bare(address) for entry in entries):
            return name
    return None


def _bare(address: str) -> str:
    """Without the scope that link-local IPv6 addresses carry."""
    return address.partition("%")[0]
