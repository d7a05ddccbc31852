#!/usr/bin/env bash
# A quarter of an hour on two cores: averages chosen afterwards against real decays, three seeds.
#
#     ./launch/decay_afterwards.sh [arguments of launch/decay_afterwards.py, such as --steps 600]
#
# Writes runs/decay_afterwards.csv and .png; docs/decay.md says what they showed.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

make_env demo
cd "$ROOT"
export OMP_NUM_THREADS=1
mkdir -p runs
OUT=runs/decay_afterwards
rm -f $OUT.csv $OUT.*.csv

pids=()
for seed in 0 1 2; do # two at a time
    "$PYTHON" launch/decay_afterwards.py --seed $seed "$@" --rows $OUT.$seed.csv &
    pids+=($!)
    [ $seed -ne 1 ] || wait "${pids[0]}"
done
for pid in "${pids[@]}"; do
    wait "$pid" || die "a run failed: the lines above say why"
done
head -n 1 $OUT.0.csv >$OUT.csv
for seed in 0 1 2; do tail -n +2 $OUT.$seed.csv >>$OUT.csv; done
"$PYTHON" launch/decay_afterwards.py --only-draw --rows $OUT.csv --picture $OUT.png
