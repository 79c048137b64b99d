"""Class names, the ``config.id2label`` of the base, which are stored with an adapter.

They are stored in the header of the weights file, which readers that do not know them ignore.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping

from torch import nn

from reft.io.adapter_files import read_list
from reft.safe_read import is_text, shown

logger = logging.getLogger(__name__)

#: Key of the header: a JSON list of names, in the order of the classes.
METADATA_KEY = "label_names"


def label_header(base: nn.Module) -> dict[str, str]:
    """The header entry for the class names of the base; empty if its classes have no names."""
    names = _names(base)
    return {} if names is None or _are_generic(names) else {METADATA_KEY: json.dumps(names)}


def read_labels(path: str | os.PathLike[str]) -> list[str] | None:
    """Read the class names that are stored with an adapter; None if there are none.

    Args:
        path: a folder that :func:`reft.io.adapter_files.read_adapter` has read.

    Raises:
        ValueError: the header's entry is not a list of names.
    """
    names = read_list(path, METADATA_KEY, "names", is_text)
    if names == []:
        raise ValueError(f"{path}: {METADATA_KEY} must be a list of names, got []")
    return names


def adopt_labels(
    base: nn.Module, names: list[str] | None, path: str | os.PathLike[str]
) -> list[str] | None:
    """Set the class names of a base to those of an adapter if the base has none.

    If the base has other names, they are kept, and a warning is logged.

    Args:
        names: the adapter's; None changes nothing.
        path: of the adapter, for the message.

    Returns:
        The names to restore with :func:`restore_labels`; None if nothing was changed.
    """
    present = _names(base)
    if names is None or present is None or present == names:
        return None
    if not _are_generic(present) or len(present) != len(names):
        logger.warning(
            "%s: the adapter was trained for the classes %s, but config.id2label of the base has "
            "%s, which is kept; set config.id2label and label2id to the right names",
            os.fspath(path), shown(names), shown(present),
        )  # fmt: skip
        return None
    _set(base, names)
    return present


def restore_labels(base: nn.Module, names: list[str] | None) -> None:
    """Undo :func:`adopt_labels`, given what it returned."""
    if names is not None:
        _set(base, names)


def _names(base: nn.Module) -> list[str] | None:
    """Names of the classes 0, 1, …; None if the base has none or numbers them otherwise."""
    names = getattr(getattr(base, "config", None), "id2label", None)
    if not isinstance(names, Mapping) or not names or {*names} != {*range(len(names))}:
        return None
    listed = [names[number] for number in range(len(names))]
    return listed if all(map(is_text, listed)) else None


def _are_generic(names: list[str]) -> bool:
    """Whether these are the names that transformers generates for unnamed classes."""
    return all(name == f"LABEL_{number}" for number, name in enumerate(names))


def _set(base: nn.Module, names: list[str]) -> None:
    config = base.config
    config.id2label = dict(enumerate(names))  # type: ignore[union-attr]
    config.label2id = {name: number for number, name in enumerate(names)}  # type: ignore[union-attr]
