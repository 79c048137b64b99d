"""Witnesses that nothing happened."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

#: Events of Python's audit hooks that a refused file has no reason to raise.
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
    """Inside, no process is started, no file is written, made or removed, nothing is unpickled."""
    events: list[str] = []
    _listening.append(events)
    try:
        yield
    finally:
        _listening.pop()
    assert not events, events


def state_of(model: nn.Module) -> dict:
    """All that a load could change: values, what is trained, modes, modules, hooks."""
    return {
        "values": {name: one.detach().clone() for name, one in model.state_dict().items()},
        "trained": {name: one.requires_grad for name, one in model.named_parameters()},
        "modules": {name: (id(one), one.training) for name, one in model.named_modules()},
        "hooks": {
            name: (list(one._forward_hooks), list(one._forward_pre_hooks))
            for name, one in model.named_modules()
        },
    }


def assert_same(before: dict, after: dict) -> None:
    """Bit for bit."""
    values, others = before["values"], after["values"]
    assert values.keys() == others.keys()
    assert all(torch.equal(values[name], others[name]) for name in values)
    assert {**before, "values": 0} == {**after, "values": 0}


def files_of(folder: Path) -> dict[str, bytes | None]:
    """Every plain file below a folder with its content, and what else is there."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }
