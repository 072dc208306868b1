#!/usr/bin/env bash
# Makes a virtual environment: make-venv.sh FOLDER STAMP shared|any PIP_ARGUMENTS...
#
# Takes the interpreter in $PYTHON, else the first of the usual names that really runs, is 3.11 or 3.12 and can make a venv; with
# `shared` it must also have a shared libpython, which the Python backend of the PyPI Triton is linked against. FOLDER/STAMP is written
# last, so an interrupted run is seen and done again.
set -euo pipefail
folder=$1 stamp=$2 need=$3
shift 3

# Prints nothing if all is well, else one line that says what is missing.
read -r -d '' probe <<'PROBE' || true
import os, sys, sysconfig
if sys.version_info[:2] not in ((3, 11), (3, 12)):
    sys.exit(f"is Python {sys.version_info[0]}.{sys.version_info[1]}")
try:
    import ensurepip, venv
except ImportError as error:
    sys.exit(f"can't make a venv ({error})")
library = os.path.join(sysconfig.get_config_var("LIBDIR") or "", sysconfig.get_config_var("INSTSONAME") or "")
if sys.argv[1] == "shared" and not (sysconfig.get_config_var("Py_ENABLE_SHARED") and os.path.isfile(library)):
    sys.exit(f"has no shared library ({library})")
PROBE

# The Triton of an NGC container brings its own backend.
if command -v tritonserver >/dev/null; then need=any; fi

tried=
python=
for candidate in ${PYTHON:-python3.12 python3.11 python3 "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.1[12].*/bin/python3}; do
    command -v "$candidate" >/dev/null || { tried+="  $candidate: not there"$'\n'; continue; }
    if reason=$("$candidate" -I -c "$probe" "$need" 2>&1); then
        python=$candidate
        break
    fi
    tried+="  $candidate: ${reason%%$'\n'*}"$'\n'
done
if [ -z "$python" ]; then
    echo "error: no Python 3.11 or 3.12 that can be used here. Tried:"
    printf '%s' "$tried"
    echo "Install one (Debian, Ubuntu: apt install python3 python3-venv libpython3-dev), or name one: make PYTHON=/path/to/python3.11"
    exit 1
fi >&2

echo "making $folder with $("$python" -c 'import sys; print(sys.executable, sys.version.split()[0])')"
"$python" -m venv --clear "$folder"
echo "installing the packages (a minute or two) ..."
if [ -n "${CPU_TORCH_INDEX:-}" ]; then
    # Where it can be reached: builds without CUDA, which save gigabytes.
    probe="import urllib.request; urllib.request.urlopen('$CPU_TORCH_INDEX/torch/', timeout=5)"
    if "$folder/bin/python" -c "$probe" 2>/dev/null; then set -- --extra-index-url "$CPU_TORCH_INDEX" "$@"; fi
fi
"$folder/bin/python" -m pip install -qq --disable-pip-version-check --no-input --only-binary :all: "$@"
touch "$folder/$stamp"
