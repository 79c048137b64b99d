"""Training loop of the demos, with a progress bar and without files."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn
from transformers import PrinterCallback, Trainer, TrainingArguments

from reft.model.reft_model import ReftModel
from reft.train.collate import ReftDataCollator
from reft.train.progress import ProgressCallback
from reft.train.records import Record
from reft.train.trainer import ReftTrainer

LOG_STEPS = 5


@dataclass(frozen=True, slots=True)
class TrainingRun:
    """Number of optimizer steps, seconds, and logged losses (dicts with ``step`` and ``loss``)."""

    steps: int
    seconds: float
    history: list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Schedule:
    """Number of epochs, peak learning rate, batch size and seed."""

    epochs: float
    learning_rate: float
    batch_size: int
    seed: int


def device() -> torch.device:
    """Return the GPU if available, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def train(
    model: nn.Module,
    collator: ReftDataCollator,
    records: Sequence[Record],
    output: Path,
    schedule: Schedule,
    console: Console | None = None,
) -> TrainingRun:
    """Train with AdamW and a linear schedule. Without a console, no progress is shown."""
    arguments = TrainingArguments(
        output_dir=str(output),
        num_train_epochs=schedule.epochs,
        per_device_train_batch_size=schedule.batch_size,
        learning_rate=schedule.learning_rate,
        warmup_steps=0.1,
        lr_scheduler_type="linear",
        logging_steps=LOG_STEPS,
        save_strategy="no",
        seed=schedule.seed,
        use_cpu=device().type == "cpu",
        disable_tqdm=True,
        report_to="none",
    )
    kind: type[Trainer] = ReftTrainer if isinstance(model, ReftModel) else Trainer
    trainer = kind(
        model,
        arguments,
        collator,
        [collator.tokenize(record) for record in records],
        callbacks=[] if console is None else [ProgressCallback(console)],
    )
    trainer.remove_callback(PrinterCallback)
    began = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - began
    history = [row for row in trainer.state.log_history if "loss" in row]
    return TrainingRun(trainer.state.global_step, seconds, history)
