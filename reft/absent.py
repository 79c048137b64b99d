"""Classes of packages that are not installed, and the error that says what to install: stand-ins
can be listed, documented, asked for and derived from."""

from __future__ import annotations

import functools
from typing import Any, NoReturn


class _Absent(type):
    """The type of a stand-in: a call and every public name that it lacks are its use."""

    _reason: str

    def __call__(cls, *args: Any, **kwargs: Any) -> NoReturn:
        raise ImportError(cls._reason)

    def __getattr__(cls, name: str) -> NoReturn:
        if name.startswith("_"):  # asked by Python and by tools that look at classes
            raise AttributeError(f"type object {cls.__name__!r} has no attribute {name!r}")
        raise ImportError(cls._reason)


@functools.cache
def stand_in(name: str, module: str, reason: str) -> type:
    """A class in the place of ``module``'s ``name``.

    Args:
        reason: why the module cannot be imported and what to do: the text of the ImportError that
            a use raises, of a subclass too.
    """
    text = f"Not there: {reason}."
    return _Absent(name, (), {"__module__": module, "__doc__": text, "_reason": reason})


def lacks_trl(error: Exception) -> ImportError:
    """The error to raise where TRL, or what it needs, cannot be imported."""
    text = "these trainers need TRL: pip install 'reft[trl]'"
    if getattr(error, "name", None) != "trl":
        text += f" (what is there cannot be imported: {str(error).splitlines()[-1]})"
    return ImportError(text)
