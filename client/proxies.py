"""No proxy stands between a client and its own machine, whatever `http_proxy` says. Knows addresses, opens no connection."""

import urllib.parse


def is_local(url: str) -> bool:
    """Whether a URL, or `host:port`, is of this machine."""
    host = urllib.parse.urlsplit(url if "//" in url else f"//{url}").hostname or ""
    return host in ("localhost", "0.0.0.0", "::1") or host.startswith("127.")
