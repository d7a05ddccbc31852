#!/usr/bin/env bash
# The documentation as HTML in docs/_build/html, in an environment of its own; warnings are errors.
#
#     ./launch/docs.sh [arguments of sphinx-build]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

VENV=$ROOT/.venv-docs
make_env docs
"$PYTHON" -m sphinx -W --keep-going "$@" "$ROOT/docs" "$ROOT/docs/_build/html"
echo "open $ROOT/docs/_build/html/index.html"
