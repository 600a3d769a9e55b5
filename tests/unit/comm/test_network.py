"""Addresses and interfaces on the way to others. Only loopback is there on every machine; the kernel's choice is played."""

from __future__ import annotations

import socket
from types import SimpleNamespace

import pytest

from relora_ds.comm import network


def test_free_port_can_be_bound() -> None:
    with socket.socket() as server:
        server.bind(("", network.free_port()))


def test_resolve() -> None:
    assert network.resolve("10.1.2.3") == "10.1.2.3"
    assert network.resolve("no such name") is None
    assert network.resolve("x" * 70) is None  # longer than a name may be


@pytest.mark.parametrize(
    ("address", "loopback"), [("127.0.1.1", True), ("::1", True), ("10.0.0.1", False), ("fe80::1%eth0", False)]
)
def test_is_loopback(address: str, loopback: bool) -> None:
    assert network.is_loopback(address) is loopback


def test_the_way_to_oneself_by_loopback_is_none() -> None:
    assert network.address_towards(["127.0.0.1", "localhost", "no such name"]) is None
    assert network.address_towards([]) is None


def test_the_first_host_that_is_not_loopback_shows_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    names = {"node1": "127.0.1.1", "node2": "10.0.0.2"}

    class Probe(socket.socket):
        """Its own address is 10.0.0.1 on the way to 10.0.0.2, as on a machine with that network."""

        def connect(self, target: tuple[str, int]) -> None:
            self.target = target[0]

        def getsockname(self) -> tuple[str, int]:
            return {"127.0.1.1": "127.0.0.1", "10.0.0.2": "10.0.0.1"}[self.target], 0

    def look_up(host: str, *_: object, **__: object) -> list[tuple]:
        if host not in names:
            raise socket.gaierror
        return [(socket.AF_INET, socket.SOCK_DGRAM, 0, "", (names[host], 9))]

    monkeypatch.setattr(network.socket, "getaddrinfo", look_up)
    monkeypatch.setattr(network.socket, "socket", Probe)
    assert network.address_towards(["unknown", "node1", "node2"]) == "10.0.0.1"


def test_interface_of(monkeypatch: pytest.MonkeyPatch) -> None:
    table = {"lo": ["127.0.0.1"], "mgmt0": ["192.168.99.1"], "ib0": ["10.0.0.1", "fe80::1%ib0"]}
    entries = {name: [SimpleNamespace(address=address) for address in addresses] for name, addresses in table.items()}
    monkeypatch.setattr(network.psutil, "net_if_addrs", lambda: entries)
    assert network.interface_of("10.0.0.1") == "ib0"
    assert network.interface_of("fe80::1") == "ib0"
    assert network.interface_of("10.0.0.99") is None
