#!/usr/bin/env bash
# Makes the virtual environment and installs Phloem into it, once for each pyproject.toml.
#   scripts/venv.sh WHAT     engine (to serve), dev (to develop; contains engine), or gpu (to develop on a GPU:
#                            dev with FlashInfer, which torch's CUDA build goes with)
# $VENV names the environment (.venv), $PYTHON the interpreter to make it with.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

usage="usage: scripts/venv.sh engine|dev|gpu"
what=${1:?$usage}
venv=${VENV:-.venv}
key=$(sha256sum pyproject.toml | cut -c1-16)
stamp=$venv/.phloem-installed

installed() {
    local name
    for name; do
        if grep -qsx "$key $name" "$stamp"; then return 0; fi
    done
    return 1
}
fail() { printf 'phloem: error: %s\n' "$1" >&2; exit 1; }

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3 python3.14 python3.13 python3.12 python3.11}; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    fail "Python 3.11 or newer is needed and was not found: install it (Debian, Ubuntu: apt install python3 python3-venv), or name one: make PYTHON=/path/to/python3"
}

case $what in  # which extras it is, and what contains it
    engine) extras=engine holders="engine dev gpu" ;;
    dev) extras=dev holders="dev gpu" ;;
    gpu) extras=dev,gpu holders=gpu ;;
    *) fail "$usage" ;;
esac
# shellcheck disable=SC2086  # a list of words
if installed $holders; then exit 0; fi

if [ ! -x "$venv/bin/python" ]; then
    python=$(find_python)
    "$python" -c 'import ensurepip, venv' 2>/dev/null ||
        fail "$python can't make virtual environments: install its venv module (Debian, Ubuntu: apt install python3-venv)"
    echo "Making $venv with $python ..."
    "$python" -m venv "$venv"
fi
echo "Installing Phloem into $venv (the first time takes minutes: torch is large) ..."
"$venv/bin/python" -m pip install --disable-pip-version-check -e ".[$extras]"
echo "$key $what" >> "$stamp"
