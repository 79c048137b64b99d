"""Which base an adapter was made for, and whether this is another one."""

from __future__ import annotations

import os
import re
import warnings
from pathlib import Path
from typing import Any

from torch import nn

from reft.config import ReftConfig
from reft.safe_read import shown

#: A folder of the hub's cache -> the name on the hub.
_CACHED = re.compile(r"^models--(.+)$")


def origin_of(base: nn.Module) -> str | None:
    """Where a base came from, as its own configuration says it; None if it does not."""
    told: Any = getattr(getattr(base, "config", None), "_name_or_path", None)
    return told or None


def warn_of_another_base(
    path: str | os.PathLike[str], config: ReftConfig, base_name: str | None
) -> None:
    """Warn where an adapter was made for a base of another name than the one that gets it: a model
    of the same shape takes it, and edits that mean nothing there.

    Args:
        path: of the adapter.
        config: its own.
        base_name: where the base came from, None if that is not known.
    """
    theirs = config.base_model_name_or_path
    if theirs is None or base_name is None or is_same(theirs, base_name):
        return
    warnings.warn(
        f"{os.fspath(path)} was made for the base model {shown(theirs)}, and this one is "
        f"{shown(base_name)}: edits of one model mean nothing in another. Load the base that it "
        "was made for, unless both names stand for the same weights",
        stacklevel=6,
    )


def is_same(one: str, other: str) -> bool:
    """Whether two names may stand for one base: equal, the same folder, or ending alike, as a name
    on the hub and a folder into which it was copied do. Small and capital letters are alike."""
    if one == other or _short(one) == _short(other):
        return True
    try:
        return Path(one).samefile(other)
    except (OSError, ValueError):
        return False


def _short(name: str) -> str:
    """The last part of a name on the hub or of a path, in small letters."""
    parts = [part for part in re.split(r"[/\\]+", name) if part not in ("", ".")]
    for part in parts:
        cached = _CACHED.match(part)
        if cached is not None:
            parts = cached[1].split("--")
            break
    return parts[-1].lower() if parts else ""
