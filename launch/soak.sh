#!/usr/bin/env bash
# Sequences of calls that nobody thought of, against an oracle:
# ./launch/soak.sh --operations N --seed S [--layout NAME] [--kinds a,b]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

make_env test
cd "$ROOT"
export OMP_NUM_THREADS=1
exec "$PYTHON" -m tests.soak "$@"
