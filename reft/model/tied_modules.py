"""Parameters that several modules of a base hold, such as the matrix of embeddings and output.

A copy of one of these modules, trained in an adapter, would be tied to the others no more. So all
of them are copied, and their copies hold one parameter again.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import replace

from torch import nn

from reft.config import ReftConfig

logger = logging.getLogger(__name__)


def with_tied_modules(base: nn.Module, nameable: Sequence[str], config: ReftConfig) -> ReftConfig:
    """A configuration whose ``modules_to_save`` name the tied modules of those that it names.

    Args:
        base: with its original modules.
        nameable: paths of the modules that may be named.
        config: of a new adapter.

    Raises:
        ValueError: a tied module cannot be added.
    """
    named: tuple[str, ...] = ()
    while ends := _other_ends(base, config.resolve_modules_to_save(nameable)):
        refused = [end for end in ends if any(base.get_submodule(end).children())]
        refused += [end for end in ends if end not in nameable]
        if refused:
            raise ValueError(_untied(ends, refused))
        named += tuple(ends)
        config = replace(config, modules_to_save=(*(config.modules_to_save or ()), *ends))
    if named:
        logger.warning(
            "modules_to_save: %s trained too, tied with what was named: one parameter is one "
            "parameter in the adapter as well",
            f"{', '.join(named)} {'is' if len(named) == 1 else 'are'}",
        )
    return config


def refuse_untying(base: nn.Module, paths: Sequence[str]) -> None:
    """Refuse to copy modules that share a parameter with others which stay.

    Args:
        base: with its original modules.
        paths: of the modules to copy.

    Raises:
        ValueError: there is such a parameter.
    """
    ends = _other_ends(base, paths)
    if ends:
        raise ValueError(_untied(ends, list(ends)))


def _other_ends(base: nn.Module, paths: Sequence[str]) -> dict[str, str]:
    """Paths of modules outside of ``paths`` that hold a parameter of a module inside -> where that
    lies inside."""
    inside: dict[int, str] = {}
    outside: dict[str, list[int]] = {}
    for path, module in base.named_modules(remove_duplicate=False):
        held = {name: one for name, one in module._parameters.items() if one is not None}
        if _within(path, paths):
            inside |= {id(one): f"{path}.{name}" for name, one in held.items()}
        elif held:
            outside[path] = [id(one) for one in held.values()]
    return {
        path: next(inside[one] for one in held if one in inside)
        for path, held in outside.items()
        if any(one in inside for one in held)
    }


def _within(path: str, outer: Iterable[str]) -> bool:
    return any(path == one or path.startswith(f"{one}.") for one in outer)


def _untied(ends: dict[str, str], refused: list[str]) -> str:
    listed = ", ".join(f"{ends[one]} (held by {one or 'the model itself'} too)" for one in refused)
    name = ", ".join(one for one in refused if one)
    return (
        f"ReftConfig.modules_to_save must name every module that holds a parameter, or none; it "
        f"would untie {listed}. {f'Name {name} too' if name else 'Name another module'}, or untie "
        "them before wrapping: base.config.tie_word_embeddings = False, and base.lm_head.weight = "
        "torch.nn.Parameter(base.lm_head.weight.detach().clone()) or alike"
    )
