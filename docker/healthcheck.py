"""Ends with 0 if the server of this container answers requests: it is ready, and so is the model whose engine generates."""

import os
import sys
import urllib.request

DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # whatever http_proxy says
PATHS = ("/v2/health/ready", "/v2/models/jax_lora/ready")


def main() -> int:
    for path in PATHS:
        url = f"http://127.0.0.1:{os.environ.get('HTTP_PORT') or 8000}{path}"
        try:
            DIRECT.open(url, timeout=4).close()
        except OSError as error:
            print(f"{url}: {error}")
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
