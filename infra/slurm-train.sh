#!/usr/bin/env bash
# Trains on the GPUs of a Slurm job, one launcher a node:
#   sbatch --gpus-per-node=8 infra/slurm-train.sh yamls/1b.yaml data.root=/shared/microdit
# A requeued job, or the same command again, goes on from the last checkpoint under runs/. Slurm warns
# 15 minutes before the time limit; then a checkpoint is saved and the job ends with exit code 143.
#SBATCH --job-name=microdit-train
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --time=72:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=TERM@900
set -euo pipefail
[[ "${1:-}" == *.yaml ]] || { echo "slurm-train.sh: give a run, e.g. yamls/1b.yaml" >&2; exit 2; }
command -v composer >/dev/null || PATH="$PWD/.venv/bin:$PATH"

gpus="${SLURM_GPUS_ON_NODE:?ask for GPUs, e.g. sbatch --gpus-per-node=8}"
mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
# What the launcher reads; the node's own rank is set where it is known, in the step.
export MASTER_ADDR="${nodes[0]}" MASTER_PORT="$((30000 + SLURM_JOB_ID % 10000))"
export LOCAL_WORLD_SIZE="$gpus" WORLD_SIZE="$((gpus * ${#nodes[@]}))"
# Not `composer`, which kills a rank that takes longer than 30 s to save after Slurm's warning. And no
# limit between the first node's end and the last one's: the first rank may still copy.
# shellcheck disable=SC2016  # expanded on each node
exec srun --kill-on-bad-exit=1 --wait=0 bash -c \
    'NODE_RANK=$SLURM_NODEID exec python -m training.launch training/train.py "$@"' bash "$@"
