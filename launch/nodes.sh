#!/usr/bin/env bash
# One node of several without a scheduler: the same command on each, HOST the name of one of them.
#   ./launch/nodes.sh HOST NODES --out /shared/runs/one --bf16
# --out must be on a file system that all nodes see. Other arguments go on to launch/train.py.
set -euo pipefail

if [ $# -lt 2 ]; then
    echo "usage: $0 HOST NODES [arguments of launch/train.py]" >&2
    exit 2
fi
host=$1 nodes=$2
shift 2
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec "${TORCHRUN:-torchrun}" --nnodes "$nodes" --nproc_per_node "${GPUS:-gpu}" \
    --rdzv_id "${RDZV_ID:-shardema}" --rdzv_backend c10d --rdzv_endpoint "$host:${PORT:-29400}" \
    launch/train.py --backend hsdp --replicas "$nodes" "$@"
