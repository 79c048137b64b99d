"""Stand-ins for classes whose extra is not installed.

A stand-in can be listed, documented, imported and subclassed. Using it raises an ImportError that
names the extra to install.
"""

from __future__ import annotations

import functools
from typing import Any, NoReturn


class _Absent(type):
    """Metaclass of stand-ins: calling the class or reading a public attribute raises."""

    _reason: str

    def __call__(cls, *args: Any, **kwargs: Any) -> NoReturn:
        raise ImportError(cls._reason)

    def __getattr__(cls, name: str) -> NoReturn:
        if name.startswith("_"):  # read by Python and by tools that inspect classes
            raise AttributeError(f"type object {cls.__name__!r} has no attribute {name!r}")
        raise ImportError(cls._reason)


@functools.cache
def stand_in(name: str, module: str, reason: str) -> type:
    """Make a class that stands in for ``name`` of ``module``.

    Args:
        reason: why the module cannot be imported and what to install. It is the text of the
            ImportError that using the class or a subclass raises.
    """
    text = f"Not available: {reason}."
    return _Absent(name, (), {"__module__": module, "__doc__": text, "_reason": reason})


def lacks_trl(error: Exception) -> ImportError:
    """Make the error for an ``import trl`` that failed, or for a missing dependency of TRL."""
    text = "these trainers need TRL: pip install 'reft[trl]'"
    if getattr(error, "name", None) != "trl":
        text += f" (the installed version cannot be imported: {str(error).splitlines()[-1]})"
    return ImportError(text)
