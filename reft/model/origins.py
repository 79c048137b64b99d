"""Comparison of the base model that an adapter was trained on with the present one."""

from __future__ import annotations

import os
import re
import warnings
from pathlib import Path
from typing import Any

from torch import nn

from reft.config import ReftConfig
from reft.safe_read import shown

#: A folder of the hub's cache, which contains the name on the hub.
_CACHED = re.compile(r"^models--(.+)$")


def origin_of(base: nn.Module) -> str | None:
    """The name or path that a base was loaded from, in its configuration; None if it has none."""
    name: Any = getattr(getattr(base, "config", None), "_name_or_path", None)
    return name or None


def warn_of_another_base(
    path: str | os.PathLike[str], config: ReftConfig, base_name: str | None
) -> None:
    """Warn if an adapter was trained on a base of another name than the present one.

    Any model of the same shape accepts the adapter, but its edits mean nothing in another model.

    Args:
        path: path of the adapter.
        config: configuration of the adapter.
        base_name: the name or path that the present base was loaded from; None if unknown.
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


def is_same(name: str, other: str) -> bool:
    """Whether two names may be of one base.

    They may if they are equal, are the same folder, or have the same last part, such as a name on
    the hub and a folder with a copy. Case is ignored.
    """
    if name == other or _short(name) == _short(other):
        return True
    try:
        return Path(name).samefile(other)
    except (OSError, ValueError):
        return False


def _short(name: str) -> str:
    """The last part of a name on the hub or of a path, in lower case."""
    parts = [part for part in re.split(r"[/\\]+", name) if part not in ("", ".")]
    for part in parts:
        cached = _CACHED.match(part)
        if cached is not None:
            parts = cached[1].split("--")
            break
    return parts[-1].lower() if parts else ""
