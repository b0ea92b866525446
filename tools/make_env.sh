#!/usr/bin/env bash
# Make the environment: a venv of Python 3.12 with the exact versions of constraints.txt.
#
#   tools/make_env.sh FOLDER
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${1:?usage: tools/make_env.sh FOLDER}

# megatron-core 0.19 needs Python 3.12 or later; constraints.txt is for 3.12.
is_312() { "$@" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' >/dev/null 2>&1; }
# shellcheck disable=SC2012  # no odd characters in versions
pyenv_python() { command -v pyenv >/dev/null && ls -d "$(pyenv root)"/versions/3.12.*/bin/python 2>/dev/null | sort -V | tail -n 1; }
python=
for candidate in python3.12 python3 "$(pyenv_python || true)"; do
    if [ -n "$candidate" ] && is_312 "$candidate"; then python=$candidate && break; fi
done
if [ -z "$python" ]; then
    echo "make_env.sh: error: no Python 3.12 found as python3.12, python3 or in pyenv; install one (pyenv install 3.12)" >&2
    exit 1
fi
"$python" -m venv "$venv"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[tools,data,dev,docs,optimizers]'
echo "environment in $venv: $("$venv/bin/python" --version)"
