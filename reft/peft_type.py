"""The entry ``peft_type`` of a stored configuration, which PEFT reads.

PEFT, and transformers through it, read every ``adapter_config.json`` as their own. Their error for
an unknown type shows only this entry, so its text names the library that wrote the folder.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from reft.safe_read import shown

FIELD = "peft_type"

_KIND = "REFT"

#: The text that is written.
ENTRY = (
    f"{_KIND}: an adapter of the package reft, which PEFT does not know; "
    "reft.ReftModel.from_pretrained(base_model, folder) reads it"
)


def is_of_peft(values: Mapping[str, Any]) -> bool:
    """Whether PEFT wrote a configuration, not this library."""
    kind = values.get(FIELD, _KIND)
    return not isinstance(kind, str) or kind.partition(":")[0] != _KIND


def without_entry(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a stored configuration without the entry for PEFT.

    Raises:
        ValueError: PEFT wrote the configuration.
    """
    if is_of_peft(values):
        raise ValueError(
            f"a ReftConfig must be one of the package reft, got one of PEFT's, {FIELD} "
            f"{shown(values[FIELD])}; peft.PeftModel.from_pretrained reads this adapter"
        )
    return {name: value for name, value in values.items() if name != FIELD}
