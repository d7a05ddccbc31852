#!/usr/bin/env bash
# Two nodes of eight GPUs, sharded within a node and replicated across: sbatch launch/slurm.sh
# Arguments go on to launch/train.py. A job that is requeued goes on from its newest step.
#SBATCH --job-name=shardema
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=01:00:00
#SBATCH --requeue
#SBATCH --output=%x-%j.out
set -euo pipefail

cd "$SLURM_SUBMIT_DIR"
out=runs/$SLURM_JOB_ID
resume=()
if compgen -G "$out/average/step-*" >/dev/null; then
    resume=(--resume)
else
    rm -rf "$out" # of this job, stopped before its first step was saved
fi
hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
first=${hosts%%$'\n'*} # not by head, which ends before scontrol has written all
# the port follows from the job, so that two jobs on one node do not meet
port=$((20000 + SLURM_JOB_ID % 10000))
srun .venv/bin/torchrun --nnodes "$SLURM_JOB_NUM_NODES" --nproc_per_node "$SLURM_GPUS_ON_NODE" \
    --rdzv_id "$SLURM_JOB_ID" --rdzv_backend c10d --rdzv_endpoint "$first:$port" \
    launch/train.py --backend hsdp --replicas "$SLURM_JOB_NUM_NODES" --out "$out" \
    ${resume[@]+"${resume[@]}"} "$@"
