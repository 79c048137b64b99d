"""A command that torchrun or ``accelerate launch`` has started in several processes."""

from __future__ import annotations

import os

from reft.cli.errors import UserError


def is_first() -> bool:
    """Whether this is the process that speaks to the user: of several, the one of rank 0."""
    return int(os.environ.get("RANK", "0")) == 0


def world_size() -> int:
    """How many processes there are."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_device(kind: str) -> str:
    """The device of this process, of those of its kind in this machine."""
    return f"{kind}:{os.environ['LOCAL_RANK']}" if "LOCAL_RANK" in os.environ else kind


def shards_the_base() -> bool:
    """Whether accelerate was told to: then each device gets its part, and the base waits on the
    CPU until then."""
    told = (os.environ.get(f"ACCELERATE_USE_{engine}") for engine in ("FSDP", "DEEPSPEED"))
    return any(one is not None and one.lower() in ("true", "1", "yes") for one in told)


def refuse_several(what: str, instead: str) -> None:
    """Refuse what every process would do once more."""
    if world_size() > 1:
        raise UserError(f"{what} runs in one process, it was started in {world_size()}: {instead}")
