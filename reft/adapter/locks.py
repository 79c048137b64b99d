"""Locks of objects that are copied and pickled with their model."""

from __future__ import annotations

import threading


class Lock:
    """A reentrant lock. A copy or an unpickled object gets a new, free lock."""

    def __init__(self) -> None:
        self._lock = threading.RLock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *error: object) -> None:
        self._lock.release()

    def __reduce__(self) -> tuple[type[Lock], tuple[()]]:
        return Lock, ()
