"""The entry of a stored configuration that PEFT looks for.

PEFT, and transformers by it, take every ``adapter_config.json`` for one of theirs, and of a kind
that they do not know they say this entry and nothing else. So it says whose the folder is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from reft.safe_read import shown

FIELD = "peft_type"

_KIND = "REFT"

#: What is written.
ENTRY = (
    f"{_KIND}: an adapter of the package reft, which PEFT does not know; "
    "reft.ReftModel.from_pretrained(base_model, folder) reads it"
)


def is_of_peft(values: Mapping[str, Any]) -> bool:
    """Whether PEFT wrote a configuration, and not this library."""
    kind = values.get(FIELD, _KIND)
    return not isinstance(kind, str) or kind.partition(":")[0] != _KIND


def without_entry(values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a stored configuration, without what is there for PEFT.

    Raises:
        ValueError: PEFT itself wrote it.
    """
    if is_of_peft(values):
        raise ValueError(
            f"a ReftConfig must be one of the package reft, got one of PEFT's, {FIELD} "
            f"{shown(values[FIELD])}; peft.PeftModel.from_pretrained reads such an adapter"
        )
    return {name: value for name, value in values.items() if name != FIELD}
