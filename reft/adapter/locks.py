"""Locks of objects that are copied and pickled with their model."""

from __future__ import annotations

import threading
from typing import Any

#: The class in C: entering the lock runs no Python. Its type is not public.
_RLock: Any = type(threading.RLock())


class Lock(_RLock):  # type: ignore[misc]
    """A reentrant lock. A copy or an unpickled object gets a new, free lock."""

    def __reduce__(self) -> tuple[type[Lock], tuple[()]]:
        return Lock, ()
