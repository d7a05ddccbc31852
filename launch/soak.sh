#!/usr/bin/env bash
# Sequences of calls that nobody thought of, against an oracle:
# ./launch/soak.sh --operations N --seed S [--layout NAME] [--kinds a,b]
# and runs of trainers, against a plain loop and the oracle:
# ./launch/soak.sh trainers --runs N --seed S [--trainer NAME]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

make_env test
cd "$ROOT"
export OMP_NUM_THREADS=1
module=tests.soak
if [ "${1:-}" = trainers ]; then
    module=tests.soak.trainers
    shift
fi
exec "$PYTHON" -m "$module" "$@"
