"""Write the public interface as text, which ``public_api.txt`` pins.

    python tests/meta/public_api.py     writes the file

Only members that this library defines are listed. So the text does not depend on the versions of
PyTorch, transformers and TRL, whose classes it extends.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
from collections.abc import Iterator, Mapping
from functools import cached_property
from importlib.metadata import distribution
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import typer

FILE = Path(__file__).with_suffix(".txt")
HEAD = """\
# What users may rely on: docs/versions.md. Written by `python tests/meta/public_api.py`.
# A change here belongs in CHANGELOG.md.
"""
OURS = ("reft", "reft_kernels")
#: Public classes that no package exports: returned by public functions, or named in the docs.
RETURNED = ("reft_kernels.dispatch.Choice", "reft.adapter.pool.AdapterPool")
NAMED = ("reft.evaluation.lm_eval.ReftLM",)
#: Special methods that are part of the interface.
SPOKEN = ("__init__", "__call__")


def text() -> str:
    """Return the whole text."""
    import reft
    import reft_kernels

    parts = [HEAD, *(_module(module) for module in (reft_kernels, reft_kernels.reference, reft))]
    return "\n".join([*parts, _others(), _command_line(), _entry_points()])


# ------------------------------------------------------------------ Python


def _module(module: Any) -> str:
    names = getattr(module, "__all__", None)
    if names is None:
        names = [
            name
            for name, value in vars(module).items()
            if inspect.isfunction(value)
            and value.__module__ == module.__name__
            and not name.startswith("_")
        ]
    lines = [f"[{module.__name__}]"]
    for name in sorted(names):
        lines += _value(name, getattr(module, name))
    return "\n".join(lines) + "\n"


def _others() -> str:
    lines = ["[classes without a name of their own]"]
    for path in (*RETURNED, *NAMED):
        module, _, name = path.rpartition(".")
        lines += _class(path, getattr(importlib.import_module(module), name))
    return "\n".join(lines) + "\n"


def _value(name: str, value: Any) -> Iterator[str]:
    if inspect.ismodule(value):
        yield f"module {name}"
    elif inspect.isclass(value):
        yield from _class(name, value)
    elif inspect.isfunction(value):
        yield from _function(f"def {name}", value)
    elif isinstance(value, Mapping):
        yield f"{name}: {', '.join(map(str, value))}"
    else:
        yield f"{name}: {type(value).__name__}"


def _class(name: str, cls: Any) -> Iterator[str]:
    bases = [
        f"{base.__module__.partition('.')[0]}.{base.__name__}"
        for base in cls.__mro__
        if base is not object and not base.__module__.startswith(OURS)
    ]
    yield f"class {name}({bases[0]})" if bases else f"class {name}"
    fields = dataclasses.fields(cls) if dataclasses.is_dataclass(cls) else ()
    for field in fields:
        if field.name.startswith("_"):
            continue
        default = "" if field.default is dataclasses.MISSING else f" = {field.default!r}"
        if field.default_factory is not dataclasses.MISSING:
            default = f" = {field.default_factory.__name__}()"
        keyword = " (by keyword)" if field.kw_only else ""
        yield f"    {field.name}: {_annotation(field.type)}{default}{keyword}"
    listed = (
        {"__init__", *(field.name for field in fields)} if fields or name in RETURNED else set()
    )
    if issubclass(cls, tuple):
        for field in cls._fields:  # a NamedTuple keeps its annotations wrapped
            listed.add(field)
            yield f"    {field}: {cls.__annotations__[field].__forward_arg__}"
    members: dict[str, Any] = {}
    for ancestor in reversed(cls.__mro__):
        if ancestor.__module__.startswith(OURS):
            members |= vars(ancestor)
    for member, value in sorted(members.items()):
        if (member in SPOKEN or not member.startswith("_")) and member not in listed:
            yield from _member(member, value)


def _member(name: str, value: Any) -> Iterator[str]:
    if isinstance(value, property):
        settable = "" if value.fset is None else " (to be set too)"
        yield f"    property {name}: {_returned(value.fget)}{settable}"
    elif isinstance(value, cached_property):
        yield f"    property {name}: {_returned(value.func)}"
    elif isinstance(value, (classmethod, staticmethod)):
        yield f"    @{type(value).__name__}"
        yield from _function(f"    def {name}", value.__func__)
    elif inspect.isfunction(value):
        yield from _function(f"    def {name}", value)
    elif hasattr(value, "__get__"):
        yield f"    property {name}"
    else:
        yield f"    {name} = {value!r}"


def _function(head: str, function: Any) -> Iterator[str]:
    """Yield one line, or one line a parameter if that is too long."""
    signature = inspect.signature(function)
    parameters = _parameters(signature)
    end = f") -> {_returned(function)}"
    line = f"{head}({', '.join(parameters)}{end}"
    if len(line) <= 96:
        yield line
        return
    indent = " " * (len(head) - len(head.lstrip()))
    yield f"{head}("
    for parameter in parameters:
        yield f"{indent}    {parameter},"
    yield indent + end


def _parameters(signature: inspect.Signature) -> list[str]:
    parts, starred = [], False
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and not starred:
            parts.append("*")
        starred |= parameter.kind in (parameter.VAR_POSITIONAL, parameter.KEYWORD_ONLY)
        stars = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
        annotation = (
            ""
            if parameter.annotation is parameter.empty
            else f": {_annotation(parameter.annotation)}"
        )
        default = "" if parameter.default is parameter.empty else f" = {parameter.default!r}"
        parts.append(f"{stars}{parameter.name}{annotation}{default}")
    return parts


def _returned(function: Any) -> str:
    return _annotation(inspect.signature(function).return_annotation)


def _annotation(given: Any) -> str:
    """Return the annotation as written; every module defers its annotations."""
    assert isinstance(given, str), f"an annotation that is no text: {given!r}"
    return given


# ------------------------------------------------------------------ command line


def _command_line() -> str:
    from reft.cli.app import app

    return "\n".join(["[command line]", *_commands("reft", app)]) + "\n"


def _commands(path: str, app: Any) -> Iterator[str]:
    """Yield a Typer and its commands, from the functions it was made of."""
    yield from _command(path, app.registered_callback.callback)
    inner: dict[str, Any] = {command.name: command.callback for command in app.registered_commands}
    inner |= {group.name: group.typer_instance for group in app.registered_groups}
    for name, entry in sorted(inner.items()):
        if inspect.isfunction(entry):
            yield from _command(f"{path} {name}", entry)
        else:
            yield from _commands(f"{path} {name}", entry)


def _command(path: str, function: Any) -> Iterator[str]:
    yield path
    for parameter in inspect.signature(function, eval_str=True).parameters.values():
        kind = parameter.annotation
        if get_origin(kind) is not Annotated:
            assert kind is typer.Context, (
                f"{path}: {parameter.name} is neither an argument nor an option"
            )
            continue
        shown, info = get_args(kind)
        # Inside Annotated, Typer's first argument is a name, not the default.
        said = [info.default, *(info.param_decls or ())]
        names = ", ".join(name for name in said if isinstance(name, str))
        names = names or info.metavar or parameter.name.upper()
        if isinstance(shown, type) and not get_args(shown):
            shown = shown.__name__
        text = (
            str(shown).replace("pathlib._local.", "").replace("pathlib.", "").replace("typing.", "")
        )
        default = (
            ", required"
            if parameter.default is parameter.empty
            else f" = {_plain(parameter.default)}"
        )
        yield f"    {names}: {text}{default}"


def _plain(value: Any) -> str:
    return repr(str(value) if isinstance(value, Path) else value)


def _entry_points() -> str:
    entry_points = distribution("reft").entry_points
    lines = sorted(f"{entry.group}: {entry.name} = {entry.value}" for entry in entry_points)
    return "\n".join(["[entry points]", *lines]) + "\n"


if __name__ == "__main__":
    FILE.write_text(text(), encoding="utf-8")
