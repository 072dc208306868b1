#!/usr/bin/env bash
# Builds llama.cpp's server for this machine: build-llama-server.sh VENV VERSION
#
# From the source that llama-cpp-python VERSION carries, with the cmake and ninja of VENV, into VENV/bin/llama-server. Needs a C++ compiler.
# The compiler finds out what the processor can do (GGML_NATIVE); the web page and HTTPS are left out. A second call goes on where one ended.
set -euo pipefail
venv=$(cd "$1" && pwd) version=$2
source=$venv/llama.cpp
if [ ! -e "$source/done" ]; then
    echo "fetching llama-cpp-python $version ..."
    rm -rf "$source" && mkdir "$source"
    "$venv/bin/pip" download -qq --disable-pip-version-check --no-deps --no-binary llama-cpp-python -d "$source" "llama-cpp-python==$version"
    tar -xzf "$source"/*.tar.gz -C "$source" --strip-components=3 --wildcards '*/vendor/llama.cpp'
    touch "$source/done"
fi
PATH=$venv/bin:$PATH
cmake -S "$source" -B "$source/build" -G Ninja -DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=OFF -DGGML_NATIVE=ON -DLLAMA_BUILD_TESTS=OFF \
    -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_APP=OFF -DLLAMA_USE_PREBUILT_UI=OFF -DLLAMA_OPENSSL=OFF >"$source/cmake.log"
echo "building llama-server (10 minutes on 2 cores) ..."
cmake --build "$source/build" --target llama-server >"$source/build.log" || { tail -n 30 "$source/build.log" >&2; exit 1; }
cp "$source/build/bin/llama-server" "$venv/bin/llama-server.new" && mv "$venv/bin/llama-server.new" "$venv/bin/llama-server"
