"""Names of a head's classes, ``config.id2label``, kept with the adapter that was trained for them.

They lie in the header of the weights file, where a reader that does not know them passes them by.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import nn

from reft.io.adapter_files import read_list
from reft.safe_read import is_text, shown

if TYPE_CHECKING:
    from reft.model.reft_model import ReftModel

logger = logging.getLogger(__name__)

#: Where the header keeps them: a JSON list, the first name of class 0.
METADATA_KEY = "label_names"


def label_header(base: nn.Module) -> dict[str, str]:
    """What the header of an adapter says of its base's classes; nothing if they have no names."""
    names = _names(base)
    return {} if names is None or _generic(names) else {METADATA_KEY: json.dumps(names)}


def read_labels(path: str | os.PathLike[str]) -> list[str] | None:
    """The names of classes that are stored with an adapter, None if there are none.

    Args:
        path: a folder that :func:`reft.io.adapter_files.read_adapter` has read.

    Raises:
        ValueError: something else stands in their place.
    """
    names = read_list(path, METADATA_KEY, "names", is_text)
    if names == []:
        raise ValueError(f"{path}: {METADATA_KEY} must be a list of names, got []")
    return names


def take_labels(model: ReftModel, names: list[str] | None, path: str | os.PathLike[str]) -> None:
    """Name the classes of a base as an adapter does, if they have no names. Other names that are
    there stay, with a warning. :meth:`ReftModel.unload` takes them away again."""
    base = model.get_base_model()
    present = _names(base)
    if names is None or present is None or present == names:
        return
    if not _generic(present) or len(present) != len(names):
        logger.warning(
            "%s: the adapter was trained for the classes %s, and the base's config.id2label says "
            "%s, which stays; set config.id2label and label2id to what is right",
            os.fspath(path), shown(names), shown(present),
        )  # fmt: skip
        return
    model._registry.unnamed_labels = present
    _set(base, names)


def give_back_labels(base: nn.Module, names: list[str] | None) -> None:
    """Name the classes of a base as before :func:`take_labels`; None if it has changed nothing."""
    if names is not None:
        _set(base, names)


def _names(base: nn.Module) -> list[str] | None:
    """Names of the classes 0, 1, …; None where a base has none or numbers them otherwise."""
    names = getattr(getattr(base, "config", None), "id2label", None)
    if not isinstance(names, Mapping) or not names or {*names} != {*range(len(names))}:
        return None
    listed = [names[number] for number in range(len(names))]
    return listed if all(map(is_text, listed)) else None


def _generic(names: list[str]) -> bool:
    """Whether these are the names that transformers gives to classes without one."""
    return all(name == f"LABEL_{number}" for number, name in enumerate(names))


def _set(base: nn.Module, names: list[str]) -> None:
    config = base.config
    config.id2label = dict(enumerate(names))  # type: ignore[union-attr]
    config.label2id = {name: number for number, name in enumerate(names)}  # type: ignore[union-attr]
