#!/usr/bin/env bash
# Train on two nodes under Slurm, one rank per GPU:
#
#   sbatch examples/launch/slurm.sh examples/digits_torch.py
#
# The environment, Horovod in it, must be active, and its folder visible from all nodes.
#SBATCH --job-name=train
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=8
#SBATCH --time=01:00:00
#SBATCH --output=%x-%j.log
set -euo pipefail

# A secret that only this job's ranks share: srun hands it on with the environment.
HVDX_JOB_TOKEN=$(od -An -N16 -tx8 /dev/urandom | tr -d ' \n')
export HVDX_JOB_TOKEN

# Ranks of a node share its cores.
export OMP_NUM_THREADS=$SLURM_CPUS_PER_TASK

# One task per rank; hvd.init() reads the rest. When one fails, all end.
srun --cpus-per-task="$SLURM_CPUS_PER_TASK" --kill-on-bad-exit=1 python "$@"
