"""Embeddings that are exchanged or resized under an adapter which has copies of them.

The copies of other adapters, and the base's own, would keep their size or be lost. So the base
refuses it for as long as such an adapter is attached.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from torch import nn

from reft.model.modules_to_save import ModulesToSave

#: Methods of transformers models that put other modules where embeddings stand.
METHODS = ("resize_token_embeddings", "set_input_embeddings", "set_output_embeddings")


def guard(base: nn.Module, heads: ModulesToSave) -> None:
    """Let a base refuse new embeddings while an adapter trains copies of the present ones.

    Args:
        base: a transformers model; its methods are covered on the instance.
        heads: the modules that adapters train in full. Without any nothing is covered.
    """
    release(base)
    if any(heads.paths.values()):
        for module in _models(base):
            for name in METHODS:
                if name not in module.__dict__:
                    setattr(module, name, partial(_checked, base, heads, module, name))


def release(base: nn.Module) -> None:
    """Take away what :func:`guard` put over the methods of a base."""
    for module in _models(base):
        for name in METHODS:
            covered = module.__dict__.get(name)
            if isinstance(covered, partial) and covered.func is _checked:
                delattr(module, name)


def _checked(
    base: nn.Module, heads: ModulesToSave, module: nn.Module, name: str, *args: Any, **kwargs: Any
) -> Any:
    """Call ``module.<name>`` as its class has it.

    Raises:
        ValueError: an adapter has copies of what would be exchanged. Nothing was changed.
    """
    method = getattr(type(module), name)
    if not _changes(module, name, *args, **kwargs):
        return method(module, *args, **kwargs)
    copied = sorted(_paths(base) & {one for paths in heads.paths.values() for one in paths})
    if copied:
        owners = ", ".join(repr(one) for one, paths in heads.paths.items() if {*paths} & {*copied})
        raise ValueError(
            f"{name} must not be called while adapters train {', '.join(copied)} in full, as "
            f"{owners} does: their copies and the base's own would no longer fit one another. Call "
            "it on the base before get_reft_model, or unload() first"
        )
    return method(module, *args, **kwargs)


def _changes(module: nn.Module, name: str, *args: Any, **kwargs: Any) -> bool:
    """Whether a call leaves other embeddings in the model than are there."""
    if name != "resize_token_embeddings":
        return not any(
            one is _embeddings(module, name.replace("set_", "get_"))
            for one in (*args, *kwargs.values())
        )
    given = dict(zip(("new_num_tokens", "pad_to_multiple_of"), args, strict=False)) | kwargs
    present = [one for one in _sides(module) if one is not None]
    rows = present[0].weight.shape[0]
    wanted, multiple = given.get("new_num_tokens"), given.get("pad_to_multiple_of") or 1
    wanted = -(-(rows if wanted is None else wanted) // multiple) * multiple
    return any(one.weight.shape[0] != wanted for one in present)


def _paths(base: nn.Module) -> set[str]:
    """Paths in a base of the embeddings of all its models, and of what they lie in."""
    wanted = {id(one) for module in _models(base) for one in _sides(module)}
    found = [path for path, one in base.named_modules(remove_duplicate=False) if id(one) in wanted]
    return {path[:end] for path in found for end in _ends(path)}


def _ends(path: str) -> Iterator[int]:
    yield from (at for at, letter in enumerate(path) if letter == ".")
    yield len(path)


def _embeddings(module: nn.Module, getter: str) -> Any:
    """What a getter of a transformers model gives; None where it has none."""
    try:
        return getattr(module, getter)()
    except (AttributeError, NotImplementedError):
        return None


def _sides(module: nn.Module) -> list[Any]:
    """Embeddings of the input and of the output; None for what is not there."""
    return [_embeddings(module, f"get_{side}_embeddings") for side in ("input", "output")]


def _models(base: nn.Module) -> list[nn.Module]:
    return [one for one in base.modules() if hasattr(type(one), METHODS[0])]
