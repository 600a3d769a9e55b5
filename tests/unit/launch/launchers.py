"""What launchers say to the processes that they start: variables as real jobs had them, or as their sources set them."""

from __future__ import annotations

SRUN = {
    "SLURM_JOB_ID": "1234567",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
    "SLURM_STEP_NODELIST": "node[03-04]",
    "SLURM_NODEID": "1",
    "SLURMD_NODENAME": "node04",
    "SLURM_NTASKS": "99",  # of the job, not of the step
    "SLURM_NNODES": "99",
    "SLURM_JOB_NODELIST": "login[1-9]",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "2",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "2",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
}
TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "10.0.0.7",
    "MASTER_PORT": "29411",
}
PTY = {  # task 0 of `srun --pty bash` on one node
    "SLURM_JOB_ID": "1", "SLURM_STEP_ID": "0", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0",
    "SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_TASKS_PER_NODE": "1", "SLURM_STEP_NODELIST": "node1",
    "SLURM_NTASKS": "1", "SLURM_NNODES": "1", "SLURM_JOB_NODELIST": "node1", "SLURM_PTY_PORT": "35551",
}  # fmt: skip
INTERACTIVE = PTY | {  # the shell of `salloc -N2 -n5` where LaunchParameters=use_interactive_step
    "SLURM_STEP_ID": "4294967290", "SLURM_NTASKS": "5", "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "node[1-2]",
}  # fmt: skip
OVER_NODES = OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "0"}

# Of one rank each: (the variables, the place that they mean). Names as (rank, world_size, local_rank, local_world_size, address)

STEP_8_OVER_2 = {  # task 5 of `srun -N2 -n8`, SLURM 22.05
    "SLURM_JOB_ID": "4242", "SLURM_STEP_ID": "0", "SLURM_STEPID": "0", "SLURM_PROCID": "5", "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1", "SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
    "SLURM_STEP_NODELIST": "gpu[11-12]", "SLURM_JOB_NODELIST": "gpu[11-12]", "SLURM_NTASKS": "8", "SLURM_NNODES": "2",
    "SLURM_TASKS_PER_NODE": "4(x2)", "SLURMD_NODENAME": "gpu12", "SLURM_LAUNCH_NODE_IPADDR": "10.1.0.11", "SLURM_GTIDS": "4,5,6,7",
}  # fmt: skip
GPUS_PER_TASK_22 = STEP_8_OVER_2 | {"SLURM_GPUS_PER_TASK": "1", "SLURM_GPUS_ON_NODE": "4", "CUDA_VISIBLE_DEVICES": "1"}
GPUS_PER_TASK_23_11 = STEP_8_OVER_2 | {  # the names changed: SLURM_GPUS_PER_TASK and SLURM_GPU_BIND are set no more
    "SLURM_TRES_PER_TASK": "gres/gpu:1", "SLURM_TRES_BIND": "gres/gpu:per_task:1", "SLURM_GPUS_ON_NODE": "4",
    "CUDA_VISIBLE_DEVICES": "0",
}  # fmt: skip
CPUS_PER_TASK_23_11 = STEP_8_OVER_2 | {"SLURM_TRES_PER_TASK": "cpu=8", "SLURM_GPUS_ON_NODE": "4"}
WRAPPED = {  # behind srun, each task: export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS MASTER_ADDR=…
    "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "gpu11", "MASTER_PORT": "29500",
}  # fmt: skip
SET_ONCE = {
    "RANK": "0",
    "WORLD_SIZE": "8",
    "MASTER_ADDR": "gpu11",
    "MASTER_PORT": "29500",
}  # export RANK=$SLURM_PROCID in the script
TORCHELASTIC = {
    "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "gpu11", "MASTER_PORT": "29400",
    "TORCHELASTIC_RUN_ID": "none", "GROUP_RANK": "1", "ROLE_RANK": "5", "ROLE_WORLD_SIZE": "8", "TORCHELASTIC_RESTART_COUNT": "0",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
}  # fmt: skip
AGENT_STEP = STEP_8_OVER_2 | {  # of the agents: one a node
    "SLURM_PROCID": "1", "SLURM_LOCALID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_NTASKS": "2",
}  # fmt: skip
MPIRUN_IN_SLURM = {  # Open MPI 4, over two nodes: orted is a task of srun
    "OMPI_COMM_WORLD_RANK": "5", "OMPI_COMM_WORLD_SIZE": "8", "OMPI_COMM_WORLD_LOCAL_RANK": "1", "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
    "PMIX_RANK": "5", "MASTER_ADDR": "gpu11",
}  # fmt: skip
PALS = {  # mpiexec of Polaris, on PBS
    "PMI_RANK": "5", "PMI_SIZE": "8", "PMI_LOCAL_RANK": "1", "PMI_LOCAL_SIZE": "4", "PALS_LOCAL_RANKID": "1", "PALS_RANKID": "5",
    "PALS_APID": "0c5d", "PBS_JOBID": "2200.polaris", "MASTER_ADDR": "x3001c0s1b0n0",
}  # fmt: skip
MVAPICH2 = {
    "MV2_COMM_WORLD_RANK": "5", "MV2_COMM_WORLD_SIZE": "8", "MV2_COMM_WORLD_LOCAL_RANK": "1", "MV2_COMM_WORLD_LOCAL_SIZE": "4",
    "MASTER_ADDR": "gpu11",
}  # fmt: skip
INTEL_MPI = {"PMI_RANK": "5", "PMI_SIZE": "8", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "4", "MASTER_ADDR": "gpu11"}
PYTORCHJOB = {  # a pod of Kubeflow with one GPU and no torchrun in it
    "RANK": "5", "WORLD_SIZE": "8", "MASTER_ADDR": "run-master-0", "MASTER_PORT": "23456", "PYTHONUNBUFFERED": "1", "PET_NNODES": "8",
    "KUBERNETES_SERVICE_HOST": "10.96.0.1",
}  # fmt: skip
TORCHRUN_IN_A_POD = TORCHELASTIC | {"KUBERNETES_SERVICE_HOST": "10.96.0.1", "MASTER_ADDR": "run-master-0"}
SAGEMAKER = {  # its mpirun, and toolkits that set torch's names beside it; no LOCAL_WORLD_SIZE
    "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "algo-1", "MASTER_PORT": "7777", "SM_NUM_GPUS": "4",
    "SM_CURRENT_HOST": "algo-2", "OMPI_COMM_WORLD_RANK": "5", "OMPI_COMM_WORLD_SIZE": "8", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
}  # fmt: skip
AZURE = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "NODE_RANK": "1", "MASTER_ADDR": "10.0.0.4", "MASTER_PORT": "6105"}
BATCHSPAWNER = {  # JupyterHub's notebook: the one task of `srun jupyterhub-singleuser` in a job with all GPUs of its node
    "SLURM_JOB_ID": "77", "SLURM_STEP_ID": "0", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0",
    "SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_TASKS_PER_NODE": "1", "SLURM_STEP_NODELIST": "gpu11",
    "SLURM_NTASKS": "1", "SLURM_NNODES": "1", "SLURM_JOB_NODELIST": "gpu11", "SLURM_GPUS_ON_NODE": "8", "JUPYTERHUB_API_TOKEN": "x",
    "CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7",
}  # fmt: skip
CLEANED = {"PATH": "/usr/bin", "HOME": "/root", "APPTAINER_CONTAINER": "/pytorch.sif"}  # apptainer exec --cleanenv

PLACES = {
    "srun 22.05 --gpus-per-task": (GPUS_PER_TASK_22, (5, 8, 1, 4, "gpu11")),
    "srun 23.11 --gpus-per-task": (GPUS_PER_TASK_23_11, (5, 8, 1, 4, "gpu11")),
    "srun 23.11 --cpus-per-task": (CPUS_PER_TASK_23_11, (5, 8, 1, 4, "gpu11")),
    "a wrapper behind srun": (STEP_8_OVER_2 | WRAPPED, (5, 8, 1, 4, "gpu11")),
    "a wrapper without LOCAL_RANK": (STEP_8_OVER_2 | WRAPPED | {"LOCAL_RANK": ""}, (5, 8, 1, 4, "gpu11")),
    "a wrapper outside of SLURM": (WRAPPED, (5, 8, 1, None, "gpu11")),
    "torchrun": (TORCHELASTIC, (5, 8, 1, 4, "gpu11")),
    "torchrun under srun": (AGENT_STEP | TORCHELASTIC, (5, 8, 1, 4, "gpu11")),
    "mpirun in SLURM": (AGENT_STEP | MPIRUN_IN_SLURM, (5, 8, 1, 4, "gpu11")),
    "a wrapper behind mpirun in SLURM": (AGENT_STEP | MPIRUN_IN_SLURM | WRAPPED, (5, 8, 1, None, "gpu11")),
    "PALS": (PALS, (5, 8, 1, 4, "x3001c0s1b0n0")),
    "PALS, the local rank by its own name": (
        {name: value for name, value in PALS.items() if name != "PMI_LOCAL_RANK"}, (5, 8, 1, 4, "x3001c0s1b0n0"),
    ),
    "MVAPICH2": (MVAPICH2, (5, 8, 1, 4, "gpu11")),
    "Intel MPI": (INTEL_MPI, (5, 8, 1, 4, "gpu11")),
    "PyTorchJob": (PYTORCHJOB, (5, 8, None, None, "run-master-0")),
    "torchrun in a pod": (TORCHRUN_IN_A_POD, (5, 8, 1, 4, "run-master-0")),
    "SageMaker": (SAGEMAKER, (5, 8, 1, None, "algo-1")),
    "Azure ML": (AZURE, (5, 8, 1, None, "10.0.0.4")),
    "batchspawner": (BATCHSPAWNER, (0, 1, 0, 1, "127.0.0.1")),
    "torch's variables on one machine": ({"RANK": "1", "WORLD_SIZE": "2"}, (1, 2, 1, 2, "127.0.0.1")),
    "a cleaned container": (CLEANED, None),
}  # fmt: skip

PLACE = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "node03",
    "MASTER_PORT": "34067",
}
