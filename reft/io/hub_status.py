"""Whether the hub can be asked; its own client tries for minutes before it says no."""

from __future__ import annotations

import socket
from urllib.parse import urlsplit
from urllib.request import getproxies

#: Seconds that a connection may take.
PATIENCE = 5


def hub_reachable() -> bool:
    """Whether the hub answers, or may: behind a proxy only the proxy knows."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    if getproxies():
        return True
    hub = urlsplit(constants.ENDPOINT)
    port = hub.port or (80 if hub.scheme == "http" else 443)
    try:
        socket.create_connection((str(hub.hostname), port), timeout=PATIENCE).close()
    except OSError:
        return False
    return True
