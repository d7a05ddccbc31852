#!/usr/bin/env bash
# Lint, types and tests: ./launch/test.sh [pytest arguments]; --full runs the long ones too.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

make_env test
cd "$ROOT"
# each rank computes with one thread: more threads than cores make small operations far slower
export OMP_NUM_THREADS=1
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
"$PYTHON" -m mypy --strict shardema
# two files at a time, each whole in one worker: it starts its ranks once for all its tests
exec "$PYTHON" -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
