"""SLURM's lists of nodes and counts, as real jobs had them, and what is asked of SLURM's programs."""

from __future__ import annotations

import pytest

from relora_ds.errors import ConfigError
from relora_ds.slurm import nodes as slurm_nodes
from relora_ds.slurm.client import SlurmError
from relora_ds.slurm.nodes import first_host, hostfile, hosts, nodes_of_job, port_of, reachable, tasks_of_nodes


@pytest.mark.parametrize(
    ("nodelist", "names"),
    [
        ("node7", "node7"),
        ("a,b", "a b"),
        ("node[03-05,9],login", "node03 node04 node05 node9 login"),
        ("gpu[01-03,7],login2,rack3-[1-2]n[5-6]", "gpu01 gpu02 gpu03 gpu7 login2 rack3-1n5 rack3-1n6 rack3-2n5 rack3-2n6"),
        ("rack[1-2]n[3,4]", "rack1n3 rack1n4 rack2n3 rack2n4"),
        ("n[01,05]-ib,login", "n01-ib n05-ib login"),
        ("login,node[03-04]", "login node03 node04"),
        ("gpu[1-2],cpu[8-10]", "gpu1 gpu2 cpu8 cpu9 cpu10"),
        ("node[007]", "node007"),
        ("n[098-101]", "n098 n099 n100 n101"),
        ("n[9-11]", "n9 n10 n11"),
    ],
)
def test_hosts_of_a_node_list(nodelist: str, names: str) -> None:
    assert list(hosts(nodelist)) == names.split()
    assert first_host(nodelist) == names.split()[0]


def test_first_host_of_nothing() -> None:
    assert list(hosts("")) == []
    with pytest.raises(ConfigError, match="names no node"):
        first_host("")


@pytest.mark.parametrize(
    ("counts", "tasks"),
    [("2", [2]), ("4(x2)", [4, 4]), ("4(x2),2", [4, 4, 2]), ("3,1", [3, 1]), ("1,8(x3),16", [1, 8, 8, 8, 16])],
)
def test_tasks_of_nodes(counts: str, tasks: list[int]) -> None:
    assert tasks_of_nodes(counts) == tasks


def test_ports_of_neighbouring_jobs_and_steps_differ() -> None:
    ports = [port_of(job, step) for job in range(1_234_500, 1_234_600) for step in range(20)]
    assert len(set(ports)) == len(ports)
    assert min(ports) >= 20000
    assert max(ports) < 30000


def test_hostfile() -> None:
    assert hostfile(["node1", "node2"], 8) == "node1 slots=8\nnode2 slots=8\n"


# SLURM's programs


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """What the programs print, by their last word; others fail."""
    table: dict[str, str] = {}
    monkeypatch.setattr(slurm_nodes, "call", lambda *command: table.get(command[-1], ""))
    return table


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The names that this machine can resolve."""
    table = {address: address for address in ("10.0.0.3", "127.0.1.1")}
    monkeypatch.setattr(slurm_nodes, "resolve", table.get)
    return table


def test_nodes_of_a_job(answers: dict[str, str]) -> None:
    answers["--jobs=17"] = "gpu[01-02],login\n"
    assert nodes_of_job(17) == ["gpu01", "gpu02", "login"]


@pytest.mark.usefixtures("answers")
def test_nodes_of_a_job_that_does_not_run() -> None:
    with pytest.raises(ConfigError, match="job=17: SLURM names no nodes for it"):
        nodes_of_job(17)


@pytest.mark.usefixtures("answers")
def test_a_name_that_resolves_is_taken(names: dict[str, str]) -> None:
    names["node3"] = "10.0.0.3"
    assert reachable("node3") == "node3"


NODE = "NodeName=node3 Arch=x86_64 Gres=(null) NodeAddr={} NodeHostName=node3 Version=22.05.8\n"


@pytest.mark.parametrize("own", [None, "127.0.1.1"], ids=["unknown", "loopback"])
@pytest.mark.parametrize("address", ["10.0.0.3", "node3-eth"])
def test_slurm_is_asked_for_the_address(answers: dict[str, str], names: dict[str, str], own: str | None, address: str) -> None:
    answers["node3"] = NODE.format(address)
    names["node3-eth"] = "10.0.0.3"
    if own:
        names["node3"] = own
    assert reachable("node3") == address


def test_slurm_is_asked_after_a_pause_and_only_where_it_must_be(
    answers: dict[str, str], names: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(slurm_nodes.time, "sleep", pauses.append)
    names["node2"] = "10.0.0.2"
    reachable("node2", pause_s=5.0)
    assert pauses == []
    answers["node3"] = NODE.format("10.0.0.3")
    reachable("node3", pause_s=5.0)
    assert pauses == [5.0]


def test_a_node_whose_own_name_means_loopback_to_slurm_too(answers: dict[str, str], names: dict[str, str]) -> None:
    answers["node3"] = NODE.format("node3")
    names["node3"] = "127.0.1.1"
    assert reachable("node3") == "node3"


@pytest.mark.parametrize("answer", ["", NODE.format("node3"), "Node node3 not found\n"])
def test_a_name_that_nobody_knows(answers: dict[str, str], names: dict[str, str], answer: str) -> None:
    answers["node3"] = answer
    with pytest.raises(ConfigError, match="MASTER_ADDR='node3': .*does not resolve.*; set MASTER_ADDR"):
        reachable("node3")


@pytest.mark.usefixtures("names")
@pytest.mark.parametrize("error", [ConfigError("scontrol", None, "is not on the PATH"), SlurmError("did not answer")])
def test_programs_that_are_missing_or_hang(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(slurm_nodes, "call", fail)
    with pytest.raises(ConfigError):
        reachable("node3")
