"""The public interface equals ``public_api.txt``, and every public name is documented."""

from __future__ import annotations

import difflib
import inspect
import operator
import re
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

import reft
import reft_kernels

sys.path.insert(0, str(Path(__file__).parent))

import public_api

PINNED = public_api.FILE.read_text(encoding="utf-8")


def test_the_public_interface_is_the_one_written_down() -> None:
    current = public_api.text()
    lines = difflib.unified_diff(
        PINNED.splitlines(), current.splitlines(), "public_api.txt", "the code", lineterm="", n=2
    )
    assert current == PINNED, (
        "the public interface changed. If that is meant: run `python tests/meta/public_api.py` and "
        "say it in CHANGELOG.md (what goes, or means something else, is deprecated first, see "
        "docs/versions.md). If not, undo it:\n" + "\n".join(lines)
    )


EDIT = "hidden, plan, encode, bias, decode, *, subtract=False, activation=None, backend='auto'"
LOREFT = "hidden, plan, rotation, weight, bias, *, backend='auto'"
PROMISED = {
    "RowPlan.from_rows": "rows, groups=None, num_groups=1",
    "RowPlan.from_padded": "positions, seq_len, groups=None, num_groups=1",
    "lowrank_edit": EDIT,
    "lowrank_edit_": EDIT,
    "explain": EDIT,
    "loreft": LOREFT,
    "loreft_": LOREFT,
    "orthonormalize": "v, base=None",
    "get_reft_model": "base_model, config, adapter_name='default'",
    "load_pyreft": "path, base_model",
    "save_pyreft": "model, path",
    "load_adapters_reft": "path, base_model",
    "ReftConfig": "intervention='loreft', rank=8, layers='all', positions='f7+l7', tied=True, "
    "activation=None, dropout=0.0, dropout_on='delta', component='block_output', init='pyreft', "
    "dtype='float32'",
    "ReftModel.from_pretrained": "base_model, path, adapter_name='default'",
    "ReftModel.save_pretrained": "self, save_directory",
    "ReftModel.generate": "self, *args",
    "ReftModel.forward": "self, *args, **kwargs",
    "ReftModel.load_adapter": "self, path, adapter_name",
    "ReftModel.add_adapter": "self, adapter_name, config",
    "ReftModel.set_adapter": "self, adapter_name",
    "ReftModel.delete_adapter": "self, adapter_name",
    "ReftModel.disable_adapter": "self",
    "ReftModel.unload": "self",
    "ReftModel.merge_and_unload": "self",
    "ReftModel.get_nb_trainable_parameters": "self",
    "ReftModel.print_trainable_parameters": "self",
}
#: Further required parameters: pyreft's files do not store them.
REQUIRED = {"load_pyreft": {"positions"}}


@pytest.mark.parametrize("name", PROMISED)
def test_what_was_promised_is_in_it(name: str) -> None:
    """Further parameters may exist if they are optional."""
    package = reft if hasattr(reft, name.partition(".")[0]) else reft_kernels
    signature = inspect.signature(operator.attrgetter(name)(package))
    bare = [
        parameter.replace(annotation=parameter.empty) for parameter in signature.parameters.values()
    ]
    words = re.findall(r"[^\s(),]+", str(inspect.Signature(bare)))
    promised = PROMISED[name].split(", ")
    assert words[: len(promised)] == promised
    more = bare[len([word for word in promised if word != "*"]) :]
    needed = {
        parameter.name
        for parameter in more
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    }
    assert needed == REQUIRED.get(name, set())


@pytest.mark.parametrize("name", ["demo", "train", "evaluate", "generate", "presets", "convert"])
def test_commands_that_were_promised(name: str) -> None:
    assert f"\nreft {name}\n" in PINNED


def test_every_name_resolves_and_is_documented() -> None:
    for package in (reft_kernels, reft):
        for name in package.__all__:
            value = getattr(package, name)
            if callable(value) or inspect.ismodule(value):
                assert inspect.getdoc(value), f"{package.__name__}.{name} has no docstring"


def test_public_methods_of_the_model_are_documented() -> None:
    for name, value in vars(reft.ReftModel).items():
        if not name.startswith("_") and callable(value):
            assert inspect.getdoc(value), f"ReftModel.{name} has no docstring"


def test_the_version_is_said_in_one_place() -> None:
    """The build reads ``reft.__version__``; the command shows the installed version."""
    root = Path(__file__).resolve().parents[2]
    assert version("reft") == reft.__version__
    project = (root / "pyproject.toml").read_text(encoding="utf-8")
    assert reft.__version__ not in re.findall(r'^version = "(.*)"', project, re.MULTILINE)
    assert 'version = { attr = "reft.__version__" }' in project
