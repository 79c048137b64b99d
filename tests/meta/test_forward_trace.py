"""The way of a forward through the files: short, and without going back and forth."""

from __future__ import annotations

import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from tiny_models import llama

from reft import ReftConfig, get_reft_model
from reft.model.edit_hook import EditHook
from reft_kernels import lowrank_edit

ROOT = Path(__file__).resolve().parents[2]


def calls_of(run: Callable[[], Any]) -> list[tuple[str, str]]:
    """(file, qualified name) of every call of this project's functions, in their order."""
    calls = []

    def profile(frame: FrameType, event: str, _: Any) -> None:
        path = Path(frame.f_code.co_filename)
        if event == "call" and path.is_relative_to(ROOT) and "tests" not in path.parts:
            calls.append((str(path.relative_to(ROOT)), frame.f_code.co_qualname))

    sys.setprofile(profile)
    try:
        run()
    finally:
        sys.setprofile(None)
    return [(file, name) for file, name in calls if file.startswith(("reft/", "reft_kernels/"))]


def files_of(calls: list[tuple[str, str]]) -> list[str]:
    return list(dict.fromkeys(file for file, _ in calls))


def moves_of(calls: list[tuple[str, str]]) -> int:
    return sum(before != after for (before, _), (after, _) in pairwise(calls))


@pytest.fixture(scope="module", params=[True, False], ids=["gradients", "no gradients"])
def calls(request) -> list[tuple[str, str]]:
    """The calls of a plain forward of a wrapped model, whose edits use the torch backend."""
    model = get_reft_model(llama(), ReftConfig(rank=4, layers=[0, 1]))
    ids = torch.randint(3, 30, (2, 7))
    with torch.set_grad_enabled(request.param), torch_backend():
        model(ids)
        return calls_of(lambda: model(ids))


def torch_backend() -> Any:
    """The edits run on the torch backend, also where the interpreter could run the kernels."""
    patch = pytest.MonkeyPatch.context()
    return _Context(patch)


class _Context:
    def __init__(self, context: Any) -> None:
        self.context = context

    def __enter__(self) -> None:
        patch = self.context.__enter__()
        patch.delenv("TRITON_INTERPRET", raising=False)

    def __exit__(self, *error: object) -> None:
        self.context.__exit__(*error)


def edits_of(calls: list[tuple[str, str]]) -> list[int]:
    return [index for index, (_, name) in enumerate(calls) if name == "EditHook.__call__"]


def test_a_forward_reaches_the_first_edit_through_few_files(calls) -> None:
    before = calls[: edits_of(calls)[0]]
    assert len(files_of(before)) <= 12, files_of(before)
    assert moves_of(before) <= 20, [file for file, _ in before]


def test_an_edited_block_crosses_few_files(calls) -> None:
    first, second = edits_of(calls)[:2]
    block = calls[first:second]
    assert len(files_of(block)) <= 6, files_of(block)


def test_five_files_lead_from_the_model_to_the_operator(calls) -> None:
    way = [
        "reft/model/reft_model.py",
        "reft/model/hooks.py",
        "reft/model/planner.py",
        "reft/model/edit_hook.py",
        "reft_kernels/functional.py",
    ]
    files = files_of(calls)
    assert [file for file in files if file in way] == way
    assert EditHook.__module__ == "reft.model.edit_hook"
    assert lowrank_edit.__module__ == "reft_kernels.functional"


def test_nothing_is_asked_twice(calls) -> None:
    """A forward reads its inputs and its adapter once."""
    names = [name for _, name in calls[: edits_of(calls)[0]]]
    once = ["read_inputs", "cache_of", "past_length", "_enter", "plan_forward", "find_prompt"]
    once += ["edited_rows", "group_edits", "AdapterParameters.forward", "ForwardPlan.__init__"]
    assert {name: names.count(name) for name in once} == dict.fromkeys(once, 1)
