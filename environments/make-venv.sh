#!/usr/bin/env bash
# Makes a virtual environment: make-venv.sh FOLDER STAMP triton|library|newest PIP_ARGUMENTS...
#
# Takes the interpreter in $PYTHON, else the first of the usual names that really runs, has the right version and can make a venv. The
# version is 3.11 or 3.12 (`newest`: or later, and 3.11 only where there is no other). With `triton` it must also have a shared libpython,
# which the Python backend of the PyPI Triton is linked against. A requirement in $PAYLOAD is installed without what it asks for.
# FOLDER/STAMP is written last, so an interrupted run is seen and done again. What was in FOLDER is removed; a link is refused, for it would be emptied where it points to.
set -euo pipefail
folder=$1 stamp=$2 need=$3
shift 3
if [ -L "$folder" ]; then
    echo "error: $folder is a link to $(readlink "$folder"), and out of date. Make it anew there, or remove the link." >&2
    exit 1
fi

# Of two at once, in terminals beside each other, the second one finds it made.
mkdir -p "$folder"
exec 9< "$folder"
if ! flock --nonblock 9; then
    echo "waiting for another make, which makes $folder ..."
    flock 9
    if [ -e "$folder/$stamp" ]; then exit 0; fi
fi

# Prints nothing if all is well, else one line that says what is missing.
read -r -d '' probe <<'PROBE' || true
import os, sys, sysconfig
if not (3, 11) <= sys.version_info[:2] <= ((3, 14) if sys.argv[1] == "newest" else (3, 12)):
    sys.exit(f"is Python {sys.version_info[0]}.{sys.version_info[1]}")
try:
    import ensurepip, venv
except ImportError as error:
    sys.exit(f"can't make a venv ({error})")
library = os.path.join(sysconfig.get_config_var("LIBDIR") or "", sysconfig.get_config_var("INSTSONAME") or "")
if sys.argv[1] == "triton" and not (sysconfig.get_config_var("Py_ENABLE_SHARED") and os.path.isfile(library)):
    sys.exit(f"has no shared library ({library})")
PROBE

# The Triton of an NGC container brings its own backend.
if [ "$need" = triton ] && command -v tritonserver >/dev/null; then need=library; fi

# pyenv's names on PATH run only the versions that are switched on; the others are there all the same.
pyenv=${PYENV_ROOT:-$HOME/.pyenv}/versions
case $need in
newest) candidates=(python3.12 "$pyenv"/3.12.*/bin/python3 python3.13 "$pyenv"/3.13.*/bin/python3 python3 python3.11) ;;
*) candidates=(python3.12 python3.11 python3 "$pyenv"/3.1[12].*/bin/python3) ;;
esac
if [ -n "${PYTHON:-}" ]; then candidates=("$PYTHON"); fi

tried=
python=
for candidate in "${candidates[@]}"; do
    command -v "$candidate" >/dev/null || { tried+="  $candidate: not there"$'\n'; continue; }
    if reason=$("$candidate" -I -c "$probe" "$need" 2>&1); then
        python=$candidate
        break
    fi
    tried+="  $candidate: ${reason%%$'\n'*}"$'\n'
done
if [ -z "$python" ]; then
    echo "error: found no Python 3.11 or 3.12 that can be used here. Tried:"
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
    if "$folder/bin/python" -c "$probe" 2>/dev/null; then
        set -- --extra-index-url "$CPU_TORCH_INDEX" "$@"
    else
        echo "CPU_TORCH_INDEX can't be reached ($CPU_TORCH_INDEX): torch comes with CUDA, some gigabytes more"
    fi
fi
install() { "$folder/bin/python" -m pip install -qq --disable-pip-version-check --no-input --only-binary :all: "$@"; }
install "$@"
if [ -n "${PAYLOAD:-}" ]; then install --no-deps "$PAYLOAD"; fi
touch "$folder/$stamp"
