# Sourced by the scripts beside it: stand in the repository, and have a Python that has everything.
#
#   setup_python FILE...   sets PYTHON to the active Python when it meets these requirement files,
#                          else to that of .venv, which is created and filled when needed.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PYTHONUTF8=1

fail() {
    echo "error: $*" >&2
    exit 2
}

# The first Python that is new enough: the active one, or one that carries its version in its name.
find_python() {
    local name
    for name in python3 python python3.13 python3.12 python3.11; do
        if command -v "$name" >/dev/null &&
            "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            command -v "$name"
            return
        fi
    done
    fail "Python 3.11 or newer is needed, found $(python3 --version 2>&1 || echo none); install it first"
}

setup_python() {
    local active problem
    active=$(find_python) || exit 2
    PYTHON="$active"
    if "$PYTHON" script/requirements_met.py "$@" >/dev/null; then
        return
    fi
    PYTHON="$PWD/.venv/bin/python"
    if [[ ! -x $PYTHON ]]; then
        "$active" -c 'import venv, ensurepip' 2>/dev/null ||
            fail "the Python module venv is missing; install it (Debian, Ubuntu: apt install python3-venv)"
        echo "setting up .venv with $("$active" --version) ..." >&2
        "$active" -m venv .venv
    fi
    if ! problem=$("$PYTHON" script/requirements_met.py "$@"); then
        echo "installing what $* asks for into .venv ($problem) ..." >&2
        local file files=()
        for file in "$@"; do files+=(-r "$file"); done
        "$PYTHON" -m pip install "${files[@]}" || fail "the installation failed; see pip's lines above"
        echo "installed; to use it yourself: source .venv/bin/activate" >&2
    fi
}
