#!/usr/bin/env bash
# All that only a GPU shows, on one GPU, in at most 9 minutes: ./launch/gpu.sh --out DIR [--dry]
# It runs on the Python that has torch, python3 unless PYTHON names another, and installs nothing.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export PYTHONPATH=$root OMP_NUM_THREADS=${OMP_NUM_THREADS:-4} PYTHONUNBUFFERED=1
exec "${PYTHON:-python3}" "$root/launch/gpu.py" "$@"
