#!/bin/sh
# Finds a Python for the environment and hands over to set_up.py.
#
# PYTHON=/path/to/python chooses one.  Without it an environment that is already there keeps its own,
# and otherwise the first tested version found is taken, then anything newer.
set -eu
cd "$(dirname "$0")/.."

# Exits 0 for a version that we test, 3 for a newer one, 1 for one that is too old; 126 or 127 where
# there is no such program (a version manager's shim exists without its interpreter).
version_of='import sys; v = sys.version_info[:2]; sys.exit(1 if v < (3, 11) else 3 if v > (3, 13) else 0)'

works() {
    command -v "$1" >/dev/null 2>&1 || return 127
    "$1" -c "$version_of" >/dev/null 2>&1
}

if [ -n "${PYTHON:-}" ]; then
    status=0
    works "$PYTHON" || status=$?
    case $status in
        0 | 3) exec "$PYTHON" scripts/set_up.py "$@" ;;
        1) echo "set-up: PYTHON=$PYTHON is older than 3.11: choose 3.11, 3.12 or 3.13" >&2 ;;
        *) echo "set-up: PYTHON=$PYTHON does not run: give the path of a Python 3.11, 3.12 or 3.13" >&2 ;;
    esac
    exit 2
fi

newer=""
for python in .venv/bin/python python3 python3.11 python3.12 python3.13 python; do
    status=0
    works "$python" || status=$?
    case $status in
        0) exec "$python" scripts/set_up.py "$@" ;;
        3) newer=${newer:-$python} ;;
    esac
done
if [ -n "$newer" ]; then
    echo "set-up: no Python 3.11, 3.12 or 3.13 found; trying $newer, a newer one, which is not tested"
    exec "$newer" scripts/set_up.py "$@"
fi
echo "set-up: no Python 3.11 or newer found: install one, or name it: make PYTHON=/path/to/python3.11" >&2
exit 2
