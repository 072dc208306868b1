#!/usr/bin/env bash
# Makes a virtual environment with perf_analyzer: install-perf-analyzer.sh VENV REQUIREMENT OLDER
#
# REQUIREMENT is its own wheel, for glibc 2.38 and later. OLDER is a Triton client whose wheel carries one for glibc 2.35; that one needs two
# libraries, which come with the Triton of .venv under names with a hash.
set -euo pipefail
requirement=$2 older=$3
glibc=$(getconf GNU_LIBC_VERSION | cut -d ' ' -f 2)

has_glibc() { [ "$(printf '%s\n' "$1" "$glibc" | sort -V | head -n 1)" = "$1" ]; }
install() { "$venv/bin/python" -m pip install -qq --disable-pip-version-check --no-input --no-deps --only-binary :all: "$1"; }

.venv/bin/python -m venv --clear "$1"
venv=$(cd "$1" && pwd)
if has_glibc 2.38; then
    install "$requirement"
elif has_glibc 2.35; then
    echo "glibc $glibc is too old for $requirement; taking the perf_analyzer of $older"
    install "$older"
    libraries=$(echo .venv/lib/python3.*/site-packages/nvidia_pytriton.libs)
    own=$venv/lib/perf_analyzer
    mkdir -p "$own"
    cp "$libraries"/libb64-*.so.0d "$own/libb64.so.0d"
    cp "$libraries"/libcudart-*.so.12.* "$own/libcudart.so.12"
    mv "$venv/bin/perf_analyzer" "$own/perf_analyzer"
    printf '#!/bin/sh\nLD_LIBRARY_PATH=%q exec %q "$@"\n' "$own" "$own/perf_analyzer" >"$venv/bin/perf_analyzer"
    chmod +x "$venv/bin/perf_analyzer"
else
    echo "error: perf_analyzer needs glibc 2.35 or later, and this machine has $glibc. NVIDIA's container with the Triton SDK"
    echo "(nvcr.io/nvidia/tritonserver:26.07-py3-sdk) has it on PATH; \`make perf\` takes it from there."
    exit 1
fi >&2
"$venv/bin/perf_analyzer" --version
