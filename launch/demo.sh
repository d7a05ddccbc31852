#!/usr/bin/env bash
# A minute on two cores: the environment, then `shardema demo` in it.
#
#     ./launch/demo.sh [arguments of shardema demo, such as --steps 1200]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

make_env demo
exec "$PYTHON" -m shardema.demo "$@"
