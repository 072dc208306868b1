#!/usr/bin/env bash
# Starts the server of the container, with a key for what changes it: ADMIN_KEY, or what the file ADMIN_KEY_FILE holds, or else one that
# is made at the first start and kept in the cache folder, where only the server's user can read it.
set -euo pipefail
cd "$(dirname "$0")/.."

kept=${CACHE_DIR:?is not set}/admin-key
if [ -z "${ADMIN_KEY:-}" ] && [ -n "${ADMIN_KEY_FILE:-}" ]; then
    ADMIN_KEY=$(<"$ADMIN_KEY_FILE")
fi
if [ -z "${ADMIN_KEY:-}" ]; then
    if [ ! -s "$kept" ]; then
        (umask 077 && python3 -c 'import secrets; print(secrets.token_urlsafe(32))' >"$kept.new" && mv "$kept.new" "$kept")
    fi
    ADMIN_KEY=$(<"$kept")
    echo "the key for model control is in $kept"
fi
export ADMIN_KEY
exec python3 -m server
