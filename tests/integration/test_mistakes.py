"""Every mistake of the table in mistakes.py raises an error of one line and changes nothing."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch
from mistakes import IDS, TABLE, Env, config
from tiny_models import llama
from torch import nn

from reft import ReftModel, get_reft_model


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> tuple[ReftModel, nn.Module, Path]:
    """A wrapped model, a bare base and the stored adapter. All mistakes share them, since the test
    checks that they do not change."""
    torch.manual_seed(0)
    model = get_reft_model(llama(), config())
    model.add_adapter("other", config(rank=2, layers=[1]))
    folder = tmp_path_factory.mktemp("stored")
    model.save_pretrained(folder)
    return model.eval(), llama(), folder


@pytest.fixture
def env(models, tmp_path, word_tokenizer) -> Env:
    model, base, stored = models
    shutil.copytree(stored, tmp_path / "good")
    return Env(model, base, tmp_path, word_tokenizer)


def state_of(model: nn.Module) -> dict:
    """Collect everything that a mistake could change in a model."""
    hooks = {
        f"{name}.{kind}": list(getattr(module, kind))
        for name, module in model.named_modules()
        for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    }
    modules = {name: (type(module), module.training) for name, module in model.named_modules()}
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    values = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    registry = getattr(model, "reft", None)
    registry_state = {}
    if registry is not None:
        registry_state = {
            "active": registry.active,
            "off": registry.disabled,
            **vars(registry.call),
        }
    return {
        "hooks": hooks,
        "modules": modules,
        "flags": flags,
        "values": values,
        "registry": registry_state,
    }


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def same(before: dict, after: dict) -> bool:
    values, others = before.pop("values"), after.pop("values")
    return (
        before == after
        and values.keys() == others.keys()
        and all(torch.equal(values[name], others[name]) for name in values)
    )


@pytest.mark.filterwarnings("error::UserWarning")
@pytest.mark.parametrize("mistake", TABLE)
def test_a_mistake_changes_nothing(mistake, env, monkeypatch):
    act, says = TABLE[mistake]
    monkeypatch.chdir(env.folder)
    written, inner = [], env.file

    def file(name, content):  # records files that the mistake itself prepares
        path = inner(name, content)
        written.append(str(path.relative_to(env.folder)))
        return path

    env.file = file
    before = state_of(env.model.base_model), state_of(env.base)
    files = files_of(env.folder)
    with pytest.raises((ValueError, TypeError, OSError, NotImplementedError)) as caught:
        act(env)
    message = str(caught.value)
    assert re.search(says, message), message
    assert "\n" not in message.strip()
    assert same(before[0], state_of(env.model.base_model))
    assert same(before[1], state_of(env.base))
    after = files_of(env.folder)
    prepared = {*written, "a/adapter_config.json", "a/adapter_model.safetensors"}
    for name in (files.keys() | after.keys()) - prepared:
        assert files.get(name) == after.get(name), name
    with torch.no_grad():  # the model still works
        env.model(IDS)
        env.model.disable_adapter()


def test_there_are_many():
    assert len(TABLE) >= 60
