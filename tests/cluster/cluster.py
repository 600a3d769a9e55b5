"""A real SLURM cluster of several nodes on one machine, for tests: ``with Cluster(folder, 2) as cluster: cluster.run(...)``.

Every node, and the controller ``ctl``, is a set of namespaces (network, UTS, mount, PID) with its own address, host name, hosts
file, ``/proc`` and ``/dev/shm``. A bridge inside the controller's network joins them. The namespaces have no names on the host:
each lives as long as its first process, which dies with this process however that ends, and takes all within with it. So two
clusters never meet, and a killed run leaves nothing behind.

    ctl     10.77.0.254   munged, slurmctld, br0 with one port pK a node
    nK      10.77.0.K     slurmd, eth0; its host calls itself nodeK

It is made to be as unkind as sites are. SLURM's name of a node is not its host name. A signal reaches what slurmstepd started, and
nothing that went into a session of its own. Every node has two GPUs that are files: SLURM deals them out, and no CUDA sees them.

TEST_SLURM=FOLDER in the environment takes SLURM from a folder that ``tests/cluster/other_slurm.sh`` has made, laid over the
nodes' /usr, instead of the one that is installed.
"""

from __future__ import annotations

import contextlib
import functools
import os
import platform
import re
import select
import shutil
import signal
import stat
import subprocess
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

INSTALL = "apt-get install slurmctld slurmd slurm-client munge iproute2"
PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "srun", "ip", "unshare", "nsenter", "setpriv", "bash", "mount")
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
OTHER = Path(os.environ["TEST_SLURM"]) if os.environ.get("TEST_SLURM") else None
MAX_NODES = 200
MAX_SOCKET_PATH = 107  # bytes of sun_path, less the closing zero

UNSHARE = ("setpriv", "--pdeathsig", "KILL", "unshare", "--net", "--uts", "--mount", "--pid", "--fork", "--kill-child=SIGKILL")

# The first process of a node. It prints its process id as the host counts it once all is mounted, and then reaps what others
# leave behind: $1 host name, $2 folder, $3 where the system keeps PMIx, $4 what is laid over /usr; either
# may be empty.
INIT = """
set -e
read -r pid _ </proc/self/stat
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t tmpfs tmpfs /dev/shm
if [ -n "$4" ]; then
    mount -t overlay overlay -o "lowerdir=$4/usr:/usr" /usr
    for plugins in "$4"/usr/lib/*/slurm-wlm; do mount --bind "$plugins" "${plugins#"$4"}"; done
fi
mount --bind "$2/hosts" /etc/hosts
[ -z "$3" ] || mount --bind "$2/pmix" "$3"
echo "$1" >/proc/sys/kernel/hostname
ip link set lo up
echo "$pid"
sleep infinity & wait
"""

PROBE = (
    "mount -t proc proc /proc; mount -t sysfs sysfs /sys; ip link add br0 type bridge; ip link add x0 type veth peer name x1; "
)
PROBE += "mount -t tmpfs tmpfs /dev/shm; mknod /dev/shm/gpu0 c 1 3"

# cgroup/v1: inside a network namespace SLURM cannot find out the version; 20.11 knows only one and has no such key.
# config_overrides: take `CPUs` on trust.
# cred_expire: a requeued job waits for its old credential to expire, two minutes by default. TmpFS by node: PMIx keeps its
# sockets there, and the nodes share a file system. NodeAddr: SLURM itself needs no names, so a test may take them away.
CGROUP_CONF = "CgroupPlugin=cgroup/v1\n"
SLURM_CONF = """\
ClusterName=test
SlurmctldHost=ctl(10.77.0.254)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.sock,cred_expire=5
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmdSpoolDir={folder}/spool/%n
StateSaveLocation={folder}/state
TmpFS={folder}/tmp/%n
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd.%n.log
ProctrackType=proctrack/pgid
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=2,bf_interval=2,bf_continue,batch_sched_delay=0
MinJobAge=3600
KillWait=20
MessageTimeout=10
SlurmdTimeout=10
ReturnToService=2
JobRequeue=1
GresTypes=gpu
NodeName=n[1-{num_nodes}] NodeHostName=node[1-{num_nodes}] NodeAddr=10.77.0.[1-{num_nodes}] CPUs={cpus} RealMemory=4000 \
Gres=gpu:{gpus} State=UNKNOWN
"""
GRES_CONF = "AutoDetect=off\nName=gpu File={folder}/gpu[0-{last}]\n"
GPUS = 2
"""Of a node. SLURM wants no more of them than files, whose names end with their numbers."""
PARTITIONS = "PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP"


@functools.cache
def missing() -> str | None:
    """What a cluster lacks on this machine, in one line; None if nothing."""
    if platform.system() != "Linux":
        return "a SLURM cluster needs Linux with network namespaces"
    if os.geteuid() != 0:
        return "a SLURM cluster needs root, to make network namespaces"
    absent = [name for name in PROGRAMS if shutil.which(name, path=PATH) is None]
    if absent:
        return f"not installed: {', '.join(absent)} ({INSTALL})"
    words = [*UNSHARE, "bash", "-ec", PROBE]
    try:
        probe = subprocess.run(words, env={"PATH": PATH}, capture_output=True, text=True, timeout=30)
    except subprocess.TimeoutExpired:
        return "making namespaces took longer than 30 s"
    if probe.returncode:
        return f"namespaces cannot be made here: {' '.join(probe.stderr.split()) or f'exit code {probe.returncode}'}"
    return None


class _Node:
    """The namespaces of one node and the daemons started in them."""

    def __init__(self, host: str, log: Path, folder: Path, pmix: Path | None) -> None:
        words = [*UNSHARE, "bash", "-c", INIT, host, host, str(folder), str(pmix or ""), str(OTHER or "")]
        self.daemons: list[subprocess.Popen[bytes]] = []
        self.pid = 0
        with log.open("ab") as output:
            # A session of its own: ctrl-C must reach the test, which then closes the cluster. --pdeathsig looks at the thread
            # that starts this, so a cluster lives no longer than the thread that made it.
            self.holder = subprocess.Popen(
                words, env={"PATH": PATH}, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=output, start_new_session=True
            )
        try:
            assert self.holder.stdout is not None
            with self.holder.stdout as pipe:
                ready, _, _ = select.select([pipe], [], [], 30)
                line = pipe.readline() if ready else b""
            if not line.strip():
                raise RuntimeError(f"the namespaces of {host} could not be made; see {log}")
            self.pid = int(line)
        except BaseException:
            self.kill()
            raise

    def prefix(self) -> list[str]:
        return ["nsenter", f"--target={self.pid}", "--net", "--uts", "--mount", "--pid", "--"]

    def network(self, *words: str) -> None:
        """Runs ``words`` in the node's network, seen from the host's processes."""
        result = subprocess.run(
            ["nsenter", f"--target={self.pid}", "--net", "--", *words],
            env={"PATH": PATH},
            capture_output=True,
            text=True,
            timeout=60,
        )
        if result.returncode:
            raise RuntimeError(f"{' '.join(words)}: {result.stderr.strip()}")

    def daemon(self, log: Path, *words: str) -> None:
        """Starts a daemon that stays in the foreground; it ends with the node."""
        with log.open("ab") as output:
            process = subprocess.Popen(
                [*self.prefix(), *words],
                env={"PATH": PATH},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        self.daemons.append(process)

    def signal_kill(self) -> None:
        """SIGKILL to all that runs in the node, without waiting for the end."""
        if self.holder.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid or self.holder.pid, signal.SIGKILL)

    def kill(self) -> None:
        """SIGKILL to all that runs in the node; its network goes with it."""
        self.signal_kill()
        # The first process of a PID namespace is gone only after all others in it are.
        for process in (self.holder, *self.daemons):
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                process.kill()  # it hangs in the kernel; what is left of it ends when the kernel lets go


class Cluster:
    """Nodes ``n1`` … ``nN`` and the controller ``ctl``, up and idle inside ``with``, gone after it.

    ``partitions`` are lines of slurm.conf that replace the one partition ``main`` of all nodes. ``rate`` limits each link both
    ways, as tc writes it: ``100mbit``. All files lie in ``folder``, which may stay or go.
    """

    def __init__(
        self, folder: Path, num_nodes: int, *, cpus: int = 4, partitions: str | None = None, rate: str | None = None
    ) -> None:
        if not 1 <= num_nodes <= MAX_NODES:
            raise ValueError(f"num_nodes is {num_nodes}; 1 to {MAX_NODES} are possible")
        self.folder = folder.resolve()
        if len(os.fsencode(self.folder / "munge.sock")) > MAX_SOCKET_PATH:
            raise ValueError(f"the path {self.folder} is too long for a socket in it")
        self.names = [f"n{k}" for k in range(1, num_nodes + 1)]
        self.cpus = cpus
        self.partitions = partitions or PARTITIONS
        self.rate = rate
        self._nodes: dict[str, _Node] = {}
        self._pmix: Path | None = None

    def __enter__(self) -> Cluster:
        reason = missing()
        if reason:
            raise RuntimeError(reason)
        try:
            self._write_files()
            self._start_controller()
            for name in self.names:
                self.start_node(name)
            self.wait_idle()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Ends every process of the cluster by SIGKILL; may be called again."""
        for node in self._nodes.values():
            node.signal_kill()
        for name in reversed(list(self._nodes)):
            self._nodes.pop(name).kill()

    # Commands and jobs

    def command_prefix(self, node: str = "ctl", cwd: Path | None = None) -> list[str]:
        """The words to put before a command so that it runs on ``node``, in ``cwd`` or the cluster's folder."""
        # setpriv: nsenter waits outside for the command inside; if it is killed, as at a timeout, so is the command.
        place = ["setpriv", "--pdeathsig", "KILL", "env", f"--chdir={cwd or self.folder}"]
        return [*self._up(node).prefix(), *place, f"SLURM_CONF={self.folder}/slurm.conf"]

    def run(
        self,
        node: str,
        *command: object,
        check: bool = True,
        timeout: float = 120.0,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Runs a command on ``node`` to its end; raises RuntimeError with its output if ``check`` and it failed."""
        words = [*self.command_prefix(node, cwd), *map(str, command)]
        result = subprocess.run(words, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout)
        if check and result.returncode:
            said = f"exit code {result.returncode}\n{result.stdout}\n{result.stderr}"
            raise RuntimeError(f"{' '.join(map(str, command))} on {node}: {said}")
        return result

    def sbatch(self, script: Path, *args: object, env: Mapping[str, str] | None = None, cwd: Path | None = None) -> int:
        """Submits ``script`` with sbatch's options ``args``; returns the job's id."""
        result = self.run("ctl", "sbatch", "--parsable", *args, script.resolve(), env=env, cwd=cwd)
        return int(result.stdout.strip().split(";")[0])

    def job(self, job_id: int | str) -> dict[str, Any]:
        """A job, also for an hour after its end: state, reason, nodes, restarts, exit_code, signal; fields has all of scontrol's."""
        text = self.run("ctl", "scontrol", "--oneliner", "show", "job", job_id).stdout.splitlines()[0]
        fields = dict(re.findall(r"(\S+?)=(.*?)(?= [A-Z]\S*?=|\s*$)", text))
        exit_code, number = map(int, fields["ExitCode"].split(":"))
        nodes = fields.get("NodeList", "")
        return {
            "state": fields["JobState"],
            "reason": fields["Reason"],
            "nodes": [] if nodes in ("", "(null)") else self.run("ctl", "scontrol", "show", "hostnames", nodes).stdout.split(),
            "restarts": int(fields["Restarts"]),
            "exit_code": exit_code,
            "signal": number,
            "fields": fields,
        }

    def wait(self, job_id: int | str, states: str | Collection[str], timeout: float = 120.0) -> dict[str, Any]:
        """The job once it is in one of ``states``; TimeoutError if that takes longer than ``timeout`` seconds."""
        wanted = {states} if isinstance(states, str) else set(states)
        seen: dict[str, Any] = {}

        def reached() -> bool:
            seen.update(self.job(job_id))
            return seen["state"] in wanted

        _until(reached, timeout, lambda: f"job {job_id} is not in {sorted(wanted)} but {seen}")
        return seen

    # Nodes

    def node_states(self) -> dict[str, str]:
        """The state of every node as sinfo has it: ``idle``, ``allocated``, ``down*``; empty while the controller is silent."""
        result = self.run("ctl", "sinfo", "--noheader", "--Node", "--format=%N %T", check=False)
        return dict(line.split() for line in result.stdout.splitlines()) if result.returncode == 0 else {}

    def wait_idle(self, *names: str, timeout: float = 60.0) -> None:
        """Until the named nodes, or all, are idle; raises, with the ends of the logs, if a daemon ended or it takes too long."""
        wanted = set(names or self.names)
        states: dict[str, str] = {}

        def reached() -> bool:
            ended = [name for name, node in self._nodes.items() if any(daemon.poll() is not None for daemon in node.daemons)]
            if ended:
                raise RuntimeError(f"a daemon ended on {', '.join(ended)}\n{self.logs()}")
            states.update(self.node_states())
            return all(states.get(name) == "idle" for name in wanted)

        _until(reached, timeout, lambda: f"nodes are not idle but {states}\n{self.logs()}")

    def kill_node(self, name: str) -> None:
        """Power off: SIGKILL to the node's slurmd, slurmstepd, tasks and all else that runs there."""
        self._up(self._node_name(name)).kill()
        del self._nodes[name]

    def start_node(self, name: str) -> None:
        """Power on, with a new link, its counters at zero; does not wait until the node is idle.

        The controller misses a killed node after 10 to 20 s and requeues its jobs then. If the node is back sooner, it can take a
        minute until the controller finds that the jobs are gone.
        """
        k = int(self._node_name(name).removeprefix("n"))
        if name in self._nodes:
            raise ValueError(f"{name} is up already")
        control = self._up("ctl")
        node = self._nodes[name] = self._unshare(name)
        # The port of a killed node leaves some time after it: the kernel takes networks down in the background.
        port = f"p{k}"
        _until(lambda: port not in _interfaces(control.pid), 30, lambda: f"{name}'s old link does not go away")
        control.network("ip", "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", str(node.pid))
        control.network("ip", "link", "set", port, "master", "br0", "up")
        node.network("ip", "address", "add", f"{self.address(name)}/24", "dev", "eth0")
        node.network("ip", "link", "set", "eth0", "up")
        if self.rate:
            limit = ("root", "tbf", "rate", self.rate, "burst", "256kb", "latency", "200ms")
            control.network("tc", "qdisc", "add", "dev", port, *limit)
            node.network("tc", "qdisc", "add", "dev", "eth0", *limit)
        for kind in ("spool", "tmp"):
            (self.folder / kind / name).mkdir(parents=True, exist_ok=True)
        node.daemon(self.folder / "log" / f"{name}.log", *self._slurm("slurmd", "-D", "-N", name))

    def cut(self, name: str) -> None:
        """Takes the node's link down; what runs there lives on."""
        self._up(name)
        self._up("ctl").network("ip", "link", "set", self._node_name(name).replace("n", "p"), "down")

    def join(self, name: str) -> None:
        """Takes the node's link up again."""
        self._up(name)
        self._up("ctl").network("ip", "link", "set", self._node_name(name).replace("n", "p"), "up")

    def tx_bytes(self, name: str) -> int:
        """Bytes that the node has sent over its link since it was started."""
        return _interfaces(self._up(self._node_name(name)).pid)["eth0"]

    def address(self, name: str) -> str:
        """The node's IPv4 address."""
        return "10.77.0.254" if name == "ctl" else f"10.77.0.{self._node_name(name).removeprefix('n')}"

    def host(self, name: str) -> str:
        """What the node calls itself."""
        return "ctl" if name == "ctl" else f"node{self._node_name(name).removeprefix('n')}"

    def logs(self, num_lines: int = 8) -> str:
        """The last lines of every log of the daemons."""
        paths = sorted((self.folder / "log").glob("*.log"))
        return "\n".join("\n".join([f"== {p.name}", *p.read_text(errors="replace").splitlines()[-num_lines:]]) for p in paths)

    # Start

    def _write_files(self) -> None:
        for name in ("log", "state", "spool", "tmp"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        hosts = ["127.0.0.1 localhost", *(f"{self.address(name)} {self.host(name)} {name}" for name in ("ctl", *self.names))]
        (self.folder / "hosts").write_text("\n".join(hosts) + "\n")
        settings = SLURM_CONF.format(folder=self.folder, num_nodes=len(self.names), cpus=self.cpus, gpus=GPUS)
        (self.folder / "slurm.conf").write_text(f"{settings}{self.partitions}\n")
        has_versions = OTHER is None or any((OTHER / "usr" / "lib").glob("*/slurm-wlm/cgroup_v1.so"))
        (self.folder / "cgroup.conf").write_text(CGROUP_CONF if has_versions else "")
        (self.folder / "gres.conf").write_text(GRES_CONF.format(folder=self.folder, last=GPUS - 1))
        for number in range(GPUS):
            os.mknod(self.folder / f"gpu{number}", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
        key = self.folder / "munge.key"
        key.unlink(missing_ok=True)
        key.touch(0o600)
        key.write_bytes(os.urandom(128))
        (self.folder / "munge.sock").unlink(missing_ok=True)
        # SLURM's PMIx plugin opens libpmix.so by that name, which Debian ships for developers only: the nodes see a copy of the
        # folder that has it.
        self._pmix = None if OTHER else next(iter(Path("/usr/lib").glob("*/pmix2/lib")), None)
        if self._pmix and not (self.folder / "pmix").exists():
            shutil.copytree(self._pmix, self.folder / "pmix", symlinks=True)
            link = self.folder / "pmix" / "libpmix.so"
            link.unlink(missing_ok=True)
            link.symlink_to("libpmix.so.2")

    def _unshare(self, name: str) -> _Node:
        return _Node(self.host(name), self.folder / "log" / f"{name}.log", self.folder, self._pmix)

    def _start_controller(self) -> None:
        control = self._nodes["ctl"] = self._unshare("ctl")
        control.network("ip", "link", "add", "br0", "type", "bridge")
        control.network("ip", "address", "add", f"{self.address('ctl')}/24", "dev", "br0")
        control.network("ip", "link", "set", "br0", "up")
        files = {"key-file": "munge.key", "socket": "munge.sock", "pid-file": "munged.pid", "seed-file": "munge.seed"}
        options = [f"--{option}={self.folder / file}" for option, file in files.items()]
        # --force: munged would refuse a folder that others may not enter, as pytest's are
        control.daemon(self.folder / "log" / "munged.log", "munged", "--foreground", "--force", *options)
        _until((self.folder / "munge.sock").exists, 30, lambda: f"munged does not start\n{self.logs()}")
        control.daemon(self.folder / "log" / "ctl.log", *self._slurm("slurmctld", "-D", "-c"))

    def _slurm(self, *words: str) -> list[str]:
        return ["env", f"SLURM_CONF={self.folder}/slurm.conf", *words]

    def _node_name(self, name: str) -> str:
        if name not in self.names:
            raise ValueError(f"no node {name!r}; there are {', '.join(self.names)}")
        return name

    def _up(self, name: str) -> _Node:
        if name not in self._nodes:
            raise ValueError(f"{name!r} is not up; up are {', '.join(self._nodes) or 'none'}")
        return self._nodes[name]


def _interfaces(pid: int) -> dict[str, int]:
    """The network interfaces that process ``pid`` sees, with the bytes that each has sent."""
    lines = Path(f"/proc/{pid}/net/dev").read_text().splitlines()[2:]
    return {name.strip(): int(numbers.split()[8]) for name, numbers in (line.split(":") for line in lines)}


def _until(reached: Callable[[], bool], timeout: float, complaint: Callable[[], str]) -> None:
    deadline = time.monotonic() + timeout
    while not reached():
        if time.monotonic() > deadline:
            raise TimeoutError(f"after {timeout:g} s: {complaint()}")
        time.sleep(0.1)
