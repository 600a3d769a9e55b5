"""Interface counters, read from folders made like the kernel's."""

from __future__ import annotations

from pathlib import Path

import pytest

from relora_ds.comm import nic
from relora_ds.comm.nic import Bytes


def interface(sys: Path, name: str, sent: int, received: int, *, kind: int = 1, physical: bool = False, marks: str = "") -> None:
    folder = sys / nic.NET / name
    (folder / "statistics").mkdir(parents=True)
    (folder / "statistics/tx_bytes").write_text(f"{sent}\n")
    (folder / "statistics/rx_bytes").write_text(f"{received}\n")
    (folder / "type").write_text(f"{kind}\n")
    (folder / "uevent").write_text("DEVTYPE=vlan\n" if marks == "vlan" else "INTERFACE=x\n")
    if physical:
        (folder / "device").mkdir()
    if marks in ("bridge", "bonding", "tun_flags"):
        (folder / marks).mkdir()


def port(sys: Path, device: str, words_sent: int, words_received: int) -> None:
    folder = sys / nic.INFINIBAND / device / "ports/1/counters"
    folder.mkdir(parents=True)
    (folder / "port_xmit_data").write_text(str(words_sent))
    (folder / "port_rcv_data").write_text(str(words_received))


def test_a_container_has_virtual_interfaces_alone(tmp_path: Path) -> None:
    interface(tmp_path, "eth0", 10, 20)
    interface(tmp_path, "lo", 5, 5)
    for marks in ("bridge", "bonding", "tun_flags", "vlan"):
        interface(tmp_path, f"x_{marks}", 99, 99, marks=marks)
    assert nic.read(tmp_path) == {"eth0": Bytes(10, 20), "lo": Bytes(5, 5)}


def test_a_node_with_infiniband(tmp_path: Path) -> None:
    """What goes over ib0 is counted by its port; docker0 and veth1 pass on what is for eth0, or stays inside."""
    interface(tmp_path, "eth0", 10, 20, physical=True)
    interface(tmp_path, "ib0", 7, 7, kind=nic.INFINIBAND_HARDWARE, physical=True)
    interface(tmp_path, "docker0", 3, 3, marks="bridge")
    interface(tmp_path, "veth1", 4, 4)
    interface(tmp_path, "lo", 5, 6)
    port(tmp_path, "mlx5_0", 100, 25)
    counters = nic.read(tmp_path)
    assert counters == {"eth0": Bytes(10, 20), "lo": Bytes(5, 6), "mlx5_0/1": Bytes(400, 100)}
    assert nic.total(counters, is_one_node=False) == Bytes(410, 120)
    assert nic.total(counters, is_one_node=True) == Bytes(5, 6)


def test_differences() -> None:
    before = {"eth0": Bytes(10, 10), "reset": Bytes(10, 10)}
    now = {"eth0": Bytes(15, 30), "reset": Bytes(9, 30), "new": Bytes(1, 1)}
    assert nic.since(before, now) == {"eth0": Bytes(5, 20)}


def test_unreadable_counters_are_left_out(tmp_path: Path) -> None:
    interface(tmp_path, "eth0", 1, 1)
    (tmp_path / nic.NET / "eth0/statistics/tx_bytes").write_text("?")
    assert nic.read(tmp_path) == {}
    assert nic.read(tmp_path / "nowhere") == {}


@pytest.mark.skipif(not Path("/sys/class/net/lo").exists(), reason="no /sys/class/net on this system")
def test_the_machines_own_loopback_counts() -> None:
    assert nic.LOOPBACK in nic.read()


def test_ways_past_the_counters(tmp_path: Path) -> None:
    port(tmp_path, "mlx5_0", 100, 25)
    assert nic.unseen(shares_memory=False, sys=tmp_path) == []
    efa = tmp_path / nic.INFINIBAND / "rdmap0s6/ports/1"
    (efa / "hw_counters").mkdir(parents=True)
    (efa / "hw_counters/tx_bytes").write_text("1000")
    (tmp_path / "class/cxi/cxi0").mkdir(parents=True)
    assert nic.unseen(shares_memory=True, sys=tmp_path) == [
        "NVLink and memory inside a node", "rdmap0s6, which keeps no counters of bytes here but its own", "cxi0 (libfabric)",
    ]  # fmt: skip
