"""The public names are these, and each says what it is."""

from __future__ import annotations

import inspect

import reft
import reft_kernels


def test_names_of_the_kernels() -> None:
    assert sorted(reft_kernels.__all__) == [
        "EditSpec",
        "FAMILY",
        "RowPlan",
        "explain",
        "fold",
        "loreft",
        "loreft_",
        "lowrank_edit",
        "lowrank_edit_",
        "orthonormalize",
        "reference",
        "reflector_base",
    ]


def test_names_of_reft() -> None:
    assert sorted(reft.__all__) == [
        "ReftConfig",
        "ReftDPOTrainer",
        "ReftDataCollator",
        "ReftModel",
        "ReftSFTTrainer",
        "ReftTrainer",
        "__version__",
        "get_reft_model",
        "load_adapters_reft",
        "load_pyreft",
        "save_pyreft",
    ]


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
