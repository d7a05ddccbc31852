# Sourced by demo.sh, test.sh and docs.sh: the environment in VENV, with the exact versions in PINS.
# Sets ROOT, VENV, PINS and PYTHON. Usage: [VENV=$ROOT/FOLDER | other_versions ROW]; make_env EXTRA

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
VENV=$ROOT/.venv
PINS=$ROOT/launch/constraints.txt
PYTHON=$VENV/bin/python

die() {
    echo "$(basename "$0"): $*" >&2
    exit 1
}

# the first Python that really runs (a shim may not) and is new enough
find_python() {
    local candidate
    for candidate in python3 python3.14 python3.13 python3.12 python3.11 python3.10 python; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    die "no python3 of version 3.10 or newer was found: install one"
}

# other_versions --versions NAME: the pins of launch/versions/NAME.txt
# other_versions --torch VERSION: this torch, and all else as in constraints.txt
other_versions() {
    local option=$1 name=${2:-}
    [ -n "$name" ] || die "$option: got nothing, expected a version after --torch, a row after --versions"
    if [ "$option" = --versions ]; then
        VENV=$ROOT/.venv-$name
        PINS=$ROOT/launch/versions/$name.txt
        [ -f "$PINS" ] || die "--versions: got $name, expected a file launch/versions/$name.txt"
        return
    fi
    VENV=$ROOT/.venv-torch$name
    mkdir -p "$VENV"
    # torch itself says which triton and setuptools it works with
    { grep -Ev '^(torch|triton|setuptools)==' "$PINS" && echo "torch==$name.*"; } >"$VENV/pins.txt"
    PINS=$VENV/pins.txt
}

make_env() {
    local extra=$1 python stamp wanted
    PYTHON=$VENV/bin/python
    if ! [ -x "$PYTHON" ]; then
        python=$(find_python)
        "$python" -c 'import venv, ensurepip' 2>/dev/null ||
            die "$python has no venv module: install it (Debian: apt install python3-venv)"
        echo "making $VENV with $python"
        "$python" -m venv "$VENV" || die "$VENV could not be made"
    fi
    "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null ||
        die "$VENV has no working Python of version 3.10 or newer: remove it and run this again"
    stamp=$VENV/.installed-$extra
    wanted=$(cat "$ROOT/pyproject.toml" "$PINS" | "$PYTHON" -c \
        'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())')
    if [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then
        return
    fi
    echo "installing shardema[$extra] into $VENV"
    "$PYTHON" -m pip --version >/dev/null 2>&1 ||
        die "$VENV has no pip: remove it and run this again"
    "$PYTHON" -m pip install --quiet --disable-pip-version-check \
        --constraint "$PINS" --editable "$ROOT[$extra]" ||
        die "pip could not install shardema[$extra]: its lines above say why"
    echo "$wanted" >"$stamp"
}
