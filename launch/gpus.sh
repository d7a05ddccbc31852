#!/usr/bin/env bash
# As gpu.sh, on all GPUs of this host together: ./launch/gpus.sh --out DIR [--dry]
set -euo pipefail
exec "$(dirname "${BASH_SOURCE[0]}")/gpu.sh" --several "$@"
