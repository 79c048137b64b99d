"""Tied modules in ``modules_to_save``: modules of a base that share a parameter, such as the input
embeddings and the output layer.

If an adapter trained a copy of one of them alone, it would no longer be tied to the others. So all
of them are copied, and their copies share one parameter again.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import replace

from torch import nn

from reft.config import ReftConfig

logger = logging.getLogger(__name__)


def with_tied_modules(base: nn.Module, nameable: Sequence[str], config: ReftConfig) -> ReftConfig:
    """Add to ``modules_to_save`` of a configuration all modules that are tied to those it names.

    Args:
        base: the transformers model with its original modules.
        nameable: paths of the modules that may be named.
        config: configuration of a new adapter.

    Raises:
        ValueError: a tied module cannot be added.
    """
    added: tuple[str, ...] = ()
    while partners := _tied_outside(base, config.resolve_modules_to_save(nameable)):
        refused = [path for path in partners if any(base.get_submodule(path).children())]
        refused += [path for path in partners if path not in nameable]
        if refused:
            raise ValueError(_untied(partners, refused))
        added += tuple(partners)
        config = replace(config, modules_to_save=(*(config.modules_to_save or ()), *partners))
    if added:
        logger.warning(
            "modules_to_save: %s trained too, because a parameter is shared with a module that was "
            "named; the adapter stores it once",
            f"{', '.join(added)} {'is' if len(added) == 1 else 'are'}",
        )
    return config


def refuse_untying(base: nn.Module, paths: Sequence[str]) -> None:
    """Refuse to copy modules that share a parameter with modules that are not copied.

    Args:
        base: the transformers model with its original modules.
        paths: paths of the modules to copy.

    Raises:
        ValueError: there is such a parameter.
    """
    partners = _tied_outside(base, paths)
    if partners:
        raise ValueError(_untied(partners, list(partners)))


def _tied_outside(base: nn.Module, paths: Sequence[str]) -> dict[str, str]:
    """Path of each module outside ``paths`` that shares a parameter with a module inside -> the
    name of that parameter inside."""
    inside: dict[int, str] = {}
    outside: dict[str, list[int]] = {}
    for path, module in base.named_modules(remove_duplicate=False):
        ids = {
            id(parameter): name
            for name, parameter in module._parameters.items()
            if parameter is not None
        }
        if _within(path, paths):
            inside |= {parameter: f"{path}.{name}" for parameter, name in ids.items()}
        elif ids:
            outside[path] = list(ids)
    return {
        path: next(inside[parameter] for parameter in ids if parameter in inside)
        for path, ids in outside.items()
        if any(parameter in inside for parameter in ids)
    }


def _within(path: str, outer: Iterable[str]) -> bool:
    return any(path == module or path.startswith(f"{module}.") for module in outer)


def _untied(partners: dict[str, str], refused: list[str]) -> str:
    """The message for modules whose copies would be untied from ``refused``."""
    shared = [f"{partners[path]} (held by {path or 'the model itself'} too)" for path in refused]
    names = ", ".join(path for path in refused if path)
    return (
        f"ReftConfig.modules_to_save must name every module that holds a parameter, or none; it "
        f"would untie {', '.join(shared)}. "
        f"{f'Name {names} too' if names else 'Name another module'}, or untie "
        "them before wrapping: base.config.tie_word_embeddings = False, and base.lm_head.weight = "
        "torch.nn.Parameter(base.lm_head.weight.detach().clone()) or alike"
    )
