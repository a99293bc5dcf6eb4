# What is different at every site, once. Sourced by the sbatch files when a job starts; what the environment sets wins.
# The SBATCH_ ones are read by sbatch itself, so source this file before you submit:
#     source slurm/site.bash && sbatch --nodes=2 slurm/torchrun.sbatch --epochs 10
# shellcheck shell=bash disable=SC2034

# export SBATCH_PARTITION=gpu
# export SBATCH_ACCOUNT=project
# export SBATCH_GPUS_PER_NODE=4
# export SBATCH_TIMELIMIT=12:00:00

# Modules to load, for example "python/3.11 cuda/12.8"; an active environment is inherited by the job anyway.
: "${DDP_STREAM_MODULES:=}"
# The network interface between nodes, for example ib0; without it, the address by which Slurm knows the first node.
: "${DDP_STREAM_INTERFACE:=}"
# How often one job may requeue itself.
: "${DDP_STREAM_MAX_REQUEUES:=50}"
# More options for srun, for example Pyxis: "--container-image=/images/torch.sqsh --container-mounts=/data,$HOME"
: "${DDP_STREAM_SRUN_OPTIONS:=}"
# A command that starts the launcher on every node, for example "apptainer exec --nv /images/torch.sif".
: "${DDP_STREAM_WRAP:=}"
