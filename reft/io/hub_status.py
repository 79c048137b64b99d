"""Names on the Hugging Face Hub, and whether it can be reached.

The hub's own client retries for minutes before it reports that it is offline.
"""

from __future__ import annotations

import socket
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

#: Seconds to wait for a connection.
_TIMEOUT = 5


def is_hub_name(name: str) -> bool:
    """Whether a name can be a repository on the hub, and is no local file or folder."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return not Path(name).exists()


def hub_reachable() -> bool:
    """Whether the hub accepts connections; assumed behind a proxy, where only the proxy knows."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    if getproxies():
        return True
    hub = urlsplit(constants.ENDPOINT)
    port = hub.port or (80 if hub.scheme == "http" else 443)
    try:
        socket.create_connection((str(hub.hostname), port), timeout=_TIMEOUT).close()
    except OSError:
        return False
    return True
