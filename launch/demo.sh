#!/usr/bin/env bash
# Three minutes on two cores: train 2 ranks of FSDP2, compare raw and averaged weights, export.
#
#     ./launch/demo.sh [arguments of launch/train.py, such as --seed 1]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

OUT=$ROOT/runs/demo
train=()                                # arguments of the run
shared=(--val-windows 256 --device cpu) # and those that its evaluation must have too
while [ $# -gt 0 ]; do
    case $1 in
    --*=*)
        set -- "${1%%=*}" "${1#*=}" "${@:2}"
        continue
        ;;
    --out | --resume | --evaluate)
        die "$1 is the demo's own: run launch/train.py for it"
        ;;
    --bf16)
        die "$1 would compare two roundings of one loss: run launch/train.py for it"
        ;;
    --data | --val-windows | --device)
        [ $# -ge 2 ] || die "$1 needs a value"
        value=$2
        # a relative path is seen from where the user stands
        [ "$1" != --data ] || value=$(realpath -m -- "$2")
        shared+=("$1" "$value")
        shift
        ;;
    *) train+=("$1") ;;
    esac
    shift
done

make_env demo
cd "$ROOT"
export OMP_NUM_THREADS=1 # per rank
rm -rf "$OUT"

# A constant learning rate and a small batch leave noise in the weights, which the average takes out.
"$PYTHON" -m torch.distributed.run --standalone --nproc_per_node 2 launch/train.py \
    --backend fsdp2 --layers 2 --width 96 --context 64 --batch 4 --lr 4e-3 \
    --steps 1200 --eval-every 100 --save-every 600 \
    ${train[@]+"${train[@]}"} "${shared[@]}" --out "$OUT" ||
    die "training failed: the lines above say why"

"$PYTHON" launch/curves.py "$OUT/log.csv" "$OUT/curves.png"
echo
echo "loading $OUT/export into a plain model, in a single process"
of_run=$(tail -n 1 "$OUT/log.csv" | cut -d, -f4)
of_export=$("$PYTHON" launch/train.py --evaluate "$OUT/export" "${shared[@]}")
"$PYTHON" - "$of_run" "${of_export##* }" <<'CHECK'
import sys

run, export = map(float, sys.argv[1:])
print(f"validation loss with averaged weights: {run:.6f} in the run, {export:.6f} from the export")
sys.exit("they differ" if abs(run - export) > 1e-5 else 0)
CHECK
