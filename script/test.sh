#!/usr/bin/env bash
# Every check in one command:  ./script/test.sh     (arguments are passed on to pytest)

source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
setup_python requirement.txt tests/requirement.txt
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
exec "$PYTHON" -m pytest "$@"
