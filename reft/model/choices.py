"""Models that choose among several texts: (batch, choices, tokens) in, one row a text inside."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from reft.model.call_state import Options


def one_a_text(options: Options, choices: int) -> Options:
    """The options of a call, one entry a text.

    Args:
        options: ``adapter_names``, and lists of ``adapter_scales`` and ``subspaces``, one entry an
            example, which holds for all its texts; ``prompt_lengths`` (batch, choices) and
            ``edit_positions`` (batch, choices, …).
        choices: texts of each example.
    """

    def repeated(values: Any) -> Any:
        if not isinstance(values, (list, tuple)):
            return values
        return [value for value in values for _ in range(choices)]

    return replace(
        options,
        adapter_names=repeated(options.adapter_names),
        adapter_scales=repeated(options.adapter_scales),
        subspaces=repeated(options.subspaces),
        prompt_lengths=_joined(options.prompt_lengths),
        edit_positions=_joined(options.edit_positions),
    )


def _joined(values: Any) -> Any:
    """Values without the dimension of examples: (batch, choices, …) as (batch · choices, …)."""
    if isinstance(values, Tensor):
        return values.flatten(0, 1)
    if isinstance(values, Sequence) and not isinstance(values, str):
        return [value for example in values for value in example]
    return values
