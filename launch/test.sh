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
# types beside the tests, whose ranks leave the cores idle while they wait for one another
types=$(mktemp)
"$PYTHON" -m mypy --strict shardema >"$types" 2>&1 &
checking=$!
trap 'kill "$checking" 2>/dev/null || true; rm -f "$types"' EXIT
status=0
# two files at a time, each whole in one worker: it starts its ranks once for all its tests
"$PYTHON" -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@" || status=$?
wait "$checking" || status=$((status ? status : 1))
cat "$types"
exit "$status"
