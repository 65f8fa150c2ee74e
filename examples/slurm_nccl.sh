#!/bin/bash
# MoCo v2 on several nodes under SLURM: one torchrun per node, which starts one rank per GPU (NCCL).
#
#     sbatch examples/slurm_nccl.sh --data FOLDER --arch resnet50 --batch-size 32 --steps 1000000
#
# Submit it from the root of the clone. Two minutes before the time limit the job goes back to the
# queue and later goes on from its checkpoint, as after a node failure; the folder must be shared.
#SBATCH --job-name=moco
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@120
set -euo pipefail

trap 'scontrol requeue "$SLURM_JOB_ID"' USR1

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 10000))}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-8}
# Some versions of srun do not take --cpus-per-task from sbatch: a node's ranks would share a core.
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}

# In the background, since bash runs a trap only between commands and in `wait`.
srun torchrun \
    --nnodes="$SLURM_JOB_NUM_NODES" --nproc-per-node="${SLURM_GPUS_ON_NODE:-8}" \
    --rdzv-backend=c10d --rdzv-id="$SLURM_JOB_ID" --rdzv-endpoint="$head:$port" \
    examples/moco_v2.py --resume --checkpoint "moco-$SLURM_JOB_ID.pt" "$@" &
wait $!
