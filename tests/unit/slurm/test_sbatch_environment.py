"""Which of the caller's variables sbatch sees, and which of them stand over a script."""

from __future__ import annotations

import pytest

from relora_ds.errors import ConfigError
from relora_ds.slurm.sbatch_environment import for_sbatch, option_of, stated_options

SCRIPT = (
    "#!/bin/bash\n#SBATCH --nodes=2 -A lm # --qos=high\n#SBATCH --mem=0\n#SBATCH --comment=don't\n#SBATCH --requeue\nsrun -t 5\n"
)


def kept(**environment: str) -> dict[str, str]:
    return for_sbatch(environment, SCRIPT).environment


def test_the_options_of_a_script() -> None:
    assert stated_options(SCRIPT) == {"nodes", "account", "mem", "comment", "requeue"}
    assert [option_of(word) for word in ("--time=1", "-t1", "-t", "1", "--requeue")] == ["time", "time", "time", None, "requeue"]


def test_what_a_user_exports_is_kept() -> None:
    mine = {
        "HOME": "/home/me",
        "RANKING": "1",
        "MY_SLURM_X": "1",
        "NCCL_DEBUG": "INFO",
        "OMP_NUM_THREADS": "4",
        "WANDB_MODE": "offline",
    }
    assert kept(**mine) == mine
    assert kept(SLURM_CONF="/etc/slurm.conf", SLURM_JWT="token") == {"SLURM_CONF": "/etc/slurm.conf", "SLURM_JWT": "token"}


@pytest.mark.parametrize(
    "name",
    [
        "SLURM_RESTART_COUNT", "SLURM_MPI_TYPE", "SLURMD_NODENAME", "SRUN_CPUS_PER_TASK", "RANK", "LOCAL_SIZE", "NODE_RANK",
        "MASTER_PORT", "GROUP_WORLD_SIZE", "TORCHELASTIC_USE_AGENT_STORE", "OMPI_COMM_WORLD_SIZE", "PMI_FD", "PMIX_NAMESPACE",
        "PALS_APID",        "MV2_COMM_WORLD_RANK", "HIP_VISIBLE_DEVICES", "DS_ACCELERATOR",
    ],
)  # fmt: skip
def test_what_a_launcher_told_the_caller_is_not(name: str) -> None:
    assert kept(**{name: "1"}) == {}


def test_a_variable_of_sbatch_gives_way_to_an_option_and_counts_without_one() -> None:
    given = {
        "SBATCH_ACCOUNT": "default",
        "SBATCH_MEM_PER_CPU": "1",
        "SBATCH_NO_REQUEUE": "1",
        "SBATCH_QOS": "high",
        "SBATCH_TIMELIMIT": "9",
    }
    how = for_sbatch(given, SCRIPT)
    assert how.environment == {"SBATCH_QOS": "high", "SBATCH_TIMELIMIT": "9"}
    assert [line.partition("=")[0] for line in how.told if "gives way" in line] == [
        "SBATCH_ACCOUNT", "SBATCH_MEM_PER_CPU", "SBATCH_NO_REQUEUE",
    ]  # fmt: skip
    assert [line.partition("=")[0] for line in how.told if "counts" in line] == ["SBATCH_QOS", "SBATCH_TIMELIMIT"]


def test_another_cluster_is_an_option_and_no_matter_of_the_job() -> None:
    for name in ("SBATCH_CLUSTERS", "SLURM_CLUSTERS"):
        how = for_sbatch({name: "alex"}, SCRIPT)
        assert (how.environment, how.options) == ({}, ("--clusters=alex",))
    assert for_sbatch({"SLURM_CLUSTERS": "alex"}, "#SBATCH -M tinygpu\n").options == ()
    assert for_sbatch({}, SCRIPT).options == ()


def test_sbatch_is_not_to_wait_for_the_end_of_the_job() -> None:
    assert kept(SBATCH_WAIT="1") == {}


@pytest.mark.parametrize("name", ["SBATCH_ARRAY_INX", "SBATCH_ARRAY"])
def test_an_array_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"^{name}='1-4': a run is one job, not an array; unset {name}$"):
        for_sbatch({name: "1-4"}, SCRIPT)
