"""Steps of ``reft train``: checks of options, tokenization, the checkpoint to resume, messages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reft.cli.errors import UserError

if TYPE_CHECKING:
    from reft.model.reft_model import ReftModel
    from reft.train.collate import ReftDataCollator
    from reft.train.trainer import ReftTrainer


def check_schedule(schedule: str) -> None:
    """Refuse a schedule that transformers does not know."""
    from transformers.trainer_utils import SchedulerType

    names = [member.value for member in SchedulerType]
    if schedule not in names:
        raise UserError(f"--schedule must be one of {', '.join(names)}; got {schedule!r}")


def resolve_max_length(requested: int | None, base: Any, model: str) -> int | None:
    """Return the maximum tokens of a sequence; None if neither the user nor the model limits it."""
    from reft.train.evaluate import context_length

    limit = context_length(base)
    if requested is not None and limit is not None and requested > limit:
        raise UserError(f"--max-length is {requested}, but {model} has {limit} positions")
    return requested or limit


def describe_run(model: ReftModel, records: int, device: Any) -> str:
    """Describe the run in a line."""
    trainable, total = model.get_nb_trainable_parameters()
    return (
        f"{records} records; training {trainable:,} of {total:,} parameters "
        f"({100 * trainable / total:.4f} %) on {device}"
    )


def final_eval_loss(trainer: ReftTrainer) -> float:
    """Return the evaluation loss of the last step, evaluating if it is not logged."""
    logged = [row for row in trainer.state.log_history if "eval_loss" in row][-1:]
    current = bool(logged) and logged[0]["step"] == trainer.state.global_step
    loss: float = (logged[0] if current else trainer.evaluate())["eval_loss"]
    return loss


def checkpointing_argument(arguments: type, enabled: bool) -> dict[str, Any]:
    """Return the argument of activation checkpointing by its name in the installed transformers."""
    names = [field.name for field in fields(arguments)]
    new = "activation_checkpointing"
    name = new if new in names else "gradient_checkpointing"
    return {name: True} if enabled else {}


def checkpoint_to_resume(output: Path, *, resume: bool, overwrite: bool) -> str | None:
    """Return the checkpoint to resume from, or None.

    Without ``overwrite``, an adapter is not replaced and an unfinished run is not restarted.
    """
    from reft.io.adapter_files import WEIGHTS_FILE
    from reft.train.checkpoints import last_checkpoint

    if resume and overwrite:
        raise UserError("--resume and --overwrite exclude each other")
    checkpoint = last_checkpoint(output)
    if resume:
        if checkpoint is None:
            raise UserError(f"--resume found no checkpoint in {output}")
        return str(checkpoint)
    if (output / WEIGHTS_FILE).exists() and not overwrite:
        raise UserError(f"{output} holds an adapter already; --overwrite replaces it")
    if checkpoint is not None and not overwrite:
        raise UserError(
            f"{output} holds an unfinished run up to {checkpoint.name}; --resume continues it, "
            "--overwrite restarts it"
        )
    return None


def tokenize_records(
    collator: ReftDataCollator, records: Sequence[dict[str, Any]], source: Path | None
) -> list[dict[str, Any]]:
    """Tokenize the records before the first step, so that a record that is too long is found."""
    examples = []
    for number, record in enumerate(records, start=1):
        try:
            examples.append(collator.tokenize(record))
        except ValueError as error:
            raise UserError(f"{source}, record {number}: {error}") from None
    return examples
