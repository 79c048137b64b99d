"""Ranks of a command that torchrun or ``accelerate launch`` started in several processes."""

from __future__ import annotations

import os

from reft.cli.errors import UserError


def is_first() -> bool:
    """Whether this process has rank 0, which prints for all."""
    return int(os.environ.get("RANK", "0")) == 0


def world_size() -> int:
    """Return the number of processes."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_device(kind: str) -> str:
    """Return the device of this process among the devices of a kind."""
    return f"{kind}:{os.environ['LOCAL_RANK']}" if "LOCAL_RANK" in os.environ else kind


def shards_the_base() -> bool:
    """Whether accelerate shards the base model, which is then loaded on the CPU first."""
    flags = (os.environ.get(f"ACCELERATE_USE_{engine}", "") for engine in ("FSDP", "DEEPSPEED"))
    return any(flag.lower() in ("true", "1", "yes") for flag in flags)


def refuse_several(what: str, instead: str) -> None:
    """Refuse a command that every process would repeat."""
    if world_size() > 1:
        raise UserError(f"{what} runs in one process, it was started in {world_size()}: {instead}")
