"""Checks that a refused file had no effect."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

#: Audit events that reading a refused file must not raise.
_ACTS = ("os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.mkdir", "os.remove", "os.rename",
         "os.rmdir", "os.symlink", "os.link", "os.chmod", "os.truncate", "subprocess.Popen",
         "socket.connect", "shutil.rmtree", "shutil.move")  # fmt: skip

_listening: list[list[str]] = []


def _hook(event: str, args: tuple) -> None:
    if not _listening:
        return
    if event in _ACTS:
        _listening[-1].append(f"{event}{args!r}")
    elif event == "open" and isinstance(args[1], str) and set(args[1]) & set("wax+"):
        _listening[-1].append(f"open for writing: {args[0]}")
    elif event == "pickle.find_class":  # of Python's own unpickler, which executes
        _listening[-1].append(f"unpickled {args!r}")


sys.addaudithook(_hook)


@contextmanager
def nothing_happens() -> Iterator[None]:
    """Fail if a process is started, a file is changed, or anything is unpickled."""
    events: list[str] = []
    _listening.append(events)
    try:
        yield
    finally:
        _listening.pop()
    assert not events, events


def state_of(model: nn.Module) -> dict:
    """Return the state that loading could change: values, requires_grad, modes, modules, hooks."""
    return {
        "values": {name: tensor.detach().clone() for name, tensor in model.state_dict().items()},
        "trained": {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        "modules": {name: (id(module), module.training) for name, module in model.named_modules()},
        "hooks": {
            name: (list(module._forward_hooks), list(module._forward_pre_hooks))
            for name, module in model.named_modules()
        },
    }


def assert_same(before: dict, after: dict) -> None:
    """Compare two states bit for bit."""
    values, others = before["values"], after["values"]
    assert values.keys() == others.keys()
    assert all(torch.equal(values[name], others[name]) for name in values)
    assert {**before, "values": 0} == {**after, "values": 0}


def files_of(folder: Path) -> dict[str, bytes | None]:
    """Read every plain file below a folder, and list other entries."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }
