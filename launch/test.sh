#!/usr/bin/env bash
# Lint, types and tests: ./launch/test.sh [pytest arguments]; --full runs the long ones too.
#
# With other versions, in an environment of their own, the tests that launch/versions/tests.txt names:
#     ./launch/test.sh --versions oldest|newest [pytest arguments, instead of those tests]
#     ./launch/test.sh --torch 2.11 [pytest arguments, instead of those tests]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

# two files at a time, each whole in one worker: it starts its ranks once for all its tests
run_tests() {
    "$PYTHON" -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
}

cd "$ROOT"
# each rank computes with one thread: more threads than cores make small operations far slower
export OMP_NUM_THREADS=1
if [ "${1:-}" = --versions ] || [ "${1:-}" = --torch ]; then
    other_versions "$1" "${2:-}"
    shift 2
    make_env test
    # what is built with one torch does not load in another
    export TORCH_EXTENSIONS_DIR=$VENV/torch_extensions PATH=$VENV/bin:$PATH
    if (($# == 0)); then
        mapfile -t tests < <(sed 's/ *#.*//; /^$/d' launch/versions/tests.txt)
        set -- "${tests[@]}"
    fi
    run_tests "$@"
    exit
fi

make_env test
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
# types beside the tests, whose ranks leave the cores idle while they wait for one another
types=$(mktemp)
"$PYTHON" -m mypy --strict shardema >"$types" 2>&1 &
checking=$!
trap 'kill "$checking" 2>/dev/null || true; rm -f "$types"' EXIT
status=0
run_tests "$@" || status=$?
wait "$checking" || status=$((status ? status : 1))
cat "$types"
exit "$status"
