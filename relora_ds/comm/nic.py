"""Byte counters of this machine's network interfaces, as the kernel keeps them."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

LOOPBACK = "lo"
NET, INFINIBAND, SLINGSHOT = "class/net", "class/infiniband", "class/cxi"
INFINIBAND_HARDWARE = 32
"""ARPHRD_INFINIBAND of linux/if_arp.h."""
LANE_BYTES = 4
"""InfiniBand's data counters count 32-bit words."""


@dataclass(frozen=True)
class Bytes:
    """sent, received: bytes, headers included."""

    sent: int
    received: int


Counters = dict[str, Bytes]
"""By interface; an InfiniBand port is named device/port."""


def read(sys: Path = Path("/sys")) -> Counters:
    """All counters now.

    Left out are interfaces whose bytes pass through another one as well (bridges, bonds, VLANs, tunnels), where there is a physical
    one, and IP over InfiniBand, whose bytes its port counts.
    """
    counters: Counters = {}
    folders = sorted((sys / NET).glob("*"))
    physical = [folder for folder in folders if (folder / "device").exists()]
    virtual = [folder for folder in folders if folder not in physical and not _passes_on(folder)]
    for folder in physical or [folder for folder in virtual if folder.name != LOOPBACK]:
        if _number(folder / "type") == INFINIBAND_HARDWARE:
            continue
        _add(counters, folder.name, folder / "statistics/tx_bytes", folder / "statistics/rx_bytes")
    _add(counters, LOOPBACK, sys / NET / LOOPBACK / "statistics/tx_bytes", sys / NET / LOOPBACK / "statistics/rx_bytes")
    for port in sorted((sys / INFINIBAND).glob("*/ports/*")):
        folder = port / "counters"
        _add(counters, f"{port.parents[1].name}/{port.name}", folder / "port_xmit_data", folder / "port_rcv_data", LANE_BYTES)
    return counters


def unseen(*, shares_memory: bool, sys: Path = Path("/sys")) -> list[str]:
    """Which ways past these counters there are: where there is one, what they saw is only a part.

    Args:
        shares_memory: whether ranks of one node exchange by NVLink or shared memory, as NCCL lets them.
        sys: where the kernel's files are.
    """
    found = ["NVLink and memory inside a node"] if shares_memory else []
    for device in sorted((sys / INFINIBAND).glob("*")):
        ports = list(device.glob("ports/*"))
        if ports and not any(_number(port / "counters/port_xmit_data") is not None for port in ports):
            found.append(
                f"{device.name}, which keeps no counters of bytes here" + (" but its own" * any(device.rglob("hw_counters")))
            )
    return found + [f"{device.name} (libfabric)" for device in sorted((sys / SLINGSHOT).glob("*"))]


def _passes_on(folder: Path) -> bool:
    """Whether this interface's bytes are another one's, too."""
    uevent = ""
    with suppress(OSError):
        uevent = (folder / "uevent").read_text(encoding="ascii")
    return any((folder / kind).exists() for kind in ("bridge", "bonding", "tun_flags")) or "DEVTYPE=vlan" in uevent


def _add(counters: Counters, name: str, sent: Path, received: Path, unit: int = 1) -> None:
    out, into = _number(sent), _number(received)
    if out is not None and into is not None:
        counters[name] = Bytes(out * unit, into * unit)


def _number(path: Path) -> int | None:
    with suppress(OSError, ValueError):
        return int(path.read_text(encoding="ascii"))
    return None


def since(before: Counters, now: Counters | None = None) -> Counters:
    """What each interface moved after ``before``; those that were not there then, or were reset, are left out."""
    now = read() if now is None else now
    pairs = [(name, before[name], count) for name, count in now.items() if name in before]
    return {
        name: Bytes(count.sent - then.sent, count.received - then.received)
        for name, then, count in pairs
        if count.sent >= then.sent and count.received >= then.received
    }


def total(moved: Counters, *, is_one_node: bool) -> Bytes:
    """The bytes between ranks: over the loopback interface where all are on one machine, over all others else."""
    chosen = [count for name, count in moved.items() if (name == LOOPBACK) == is_one_node]
    return Bytes(sum(count.sent for count in chosen), sum(count.received for count in chosen))
