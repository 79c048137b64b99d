"""Refusal to replace or resize embeddings while an adapter trains copies of them.

The originals and the copies of other adapters would keep their old size or be lost. So the base
refuses it as long as such an adapter is attached.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from torch import nn

from reft.model.modules_to_save import ModulesToSave

#: Methods of transformers models that replace embeddings.
METHODS = ("resize_token_embeddings", "set_input_embeddings", "set_output_embeddings")


def guard(base: nn.Module, modules_to_save: ModulesToSave) -> None:
    """Make a base refuse new embeddings while an adapter trains copies of the present ones.

    Args:
        base: a transformers model; :data:`METHODS` are replaced on the instance.
        modules_to_save: modules that adapters train in full. Without any nothing is replaced.
    """
    release(base)
    if any(modules_to_save.paths.values()):
        for module in _models(base):
            for name in METHODS:
                if name not in module.__dict__:
                    setattr(module, name, partial(_checked, base, modules_to_save, module, name))


def release(base: nn.Module) -> None:
    """Undo :func:`guard`."""
    for module in _models(base):
        for name in METHODS:
            method = module.__dict__.get(name)
            if isinstance(method, partial) and method.func is _checked:
                delattr(module, name)


def _checked(
    base: nn.Module,
    modules_to_save: ModulesToSave,
    module: nn.Module,
    name: str,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Call the method ``name`` of the class of ``module``.

    Raises:
        ValueError: an adapter trains copies of the embeddings that would be replaced. Nothing was
            changed.
    """
    method = getattr(type(module), name)
    if not _changes(module, name, *args, **kwargs):
        return method(module, *args, **kwargs)
    adapters = modules_to_save.paths
    copied = sorted(_paths(base) & {path for paths in adapters.values() for path in paths})
    if copied:
        owners = ", ".join(
            repr(adapter) for adapter, paths in adapters.items() if {*paths} & {*copied}
        )
        raise ValueError(
            f"{name} must not be called while adapters train {', '.join(copied)} in full, as "
            f"{owners} does: their copies and the base's own would no longer fit one another. Call "
            "it on the base before get_reft_model, or unload() first"
        )
    return method(module, *args, **kwargs)


def _changes(module: nn.Module, name: str, *args: Any, **kwargs: Any) -> bool:
    """Whether a call replaces or resizes the present embeddings."""
    if name != "resize_token_embeddings":
        present = _embeddings(module, name.replace("set_", "get_"))
        return not any(argument is present for argument in (*args, *kwargs.values()))
    given = dict(zip(("new_num_tokens", "pad_to_multiple_of"), args, strict=False)) | kwargs
    rows = [
        embeddings.weight.shape[0]
        for embeddings in _both_embeddings(module)
        if embeddings is not None
    ]
    requested, multiple = given.get("new_num_tokens"), given.get("pad_to_multiple_of") or 1
    resized = -(-(rows[0] if requested is None else requested) // multiple) * multiple
    return any(count != resized for count in rows)


def _paths(base: nn.Module) -> set[str]:
    """Paths in a base of the embeddings of all its models, and of the modules around them."""
    ids = {id(embeddings) for module in _models(base) for embeddings in _both_embeddings(module)}
    paths = [
        path for path, module in base.named_modules(remove_duplicate=False) if id(module) in ids
    ]
    return {prefix for path in paths for prefix in _prefixes(path)}


def _prefixes(path: str) -> Iterator[str]:
    """The paths of the modules around a module, and its own."""
    parts = path.split(".")
    return (".".join(parts[:count]) for count in range(1, len(parts) + 1))


def _embeddings(module: nn.Module, getter: str) -> Any:
    """The result of a getter of a transformers model; None if it has no such embeddings."""
    try:
        return getattr(module, getter)()
    except (AttributeError, NotImplementedError):
        return None


def _both_embeddings(module: nn.Module) -> list[Any]:
    """Input and output embeddings; None for those that the model lacks."""
    return [_embeddings(module, f"get_{side}_embeddings") for side in ("input", "output")]


def _models(base: nn.Module) -> list[nn.Module]:
    """The transformers models among the modules of a base."""
    return [module for module in base.modules() if hasattr(type(module), METHODS[0])]
