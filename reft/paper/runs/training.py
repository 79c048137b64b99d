"""Training of a run: arguments of Trainer from a preset, and the loss curve."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from transformers import (
    EvalPrediction,
    PreTrainedTokenizerBase,
    PrinterCallback,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer_callback import ExportableState

from reft.model.reft_model import ReftModel
from reft.paper.presets import Preset
from reft.paper.runs.result import peak_memory, start_memory
from reft.train.checkpoints import last_checkpoint
from reft.train.collate import ReftDataCollator
from reft.train.progress import ProgressCallback
from reft.train.trainer import ReftTrainer

#: Share of the steps between checkpoints, which an interrupted run loses at most.
SAVE_EVERY = 0.05

#: Share of the steps between points of the loss curve.
LOG_EVERY = 0.01

#: (predictions, labels) -> metrics.
Metrics = Callable[[np.ndarray, np.ndarray], Mapping[str, float]]


@dataclass(frozen=True)
class Training:
    """Results of training, over all processes of a resumed run.

    Attributes:
        steps: optimizer steps.
        epochs: passes over the data.
        seconds: duration of training and of the evaluations between epochs.
        tokens: number of attended training tokens.
        tokens_per_second: ``tokens`` by ``seconds``.
        memory: result of :func:`reft.paper.runs.result.peak_memory`.
        loss: the last training loss of the curve.
        curve: rows with ``step``, ``epoch``, ``loss`` and ``learning_rate``.
        selection: rows with ``step``, ``epoch`` and the metrics on the selection records, and
            ``best``, the step of the best checkpoint; empty without selection records.
    """

    steps: int
    epochs: float
    seconds: float
    tokens: int
    tokens_per_second: float
    memory: dict[str, Any]
    loss: float
    curve: list[dict[str, float]]
    selection: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Return every field as JSON values."""
        return asdict(self)


class Clock(TrainerCallback, ExportableState):
    """Callback that stores seconds and peak memory in checkpoints, for resumed runs."""

    def __init__(self, seconds: float = 0.0, memory: dict[str, Any] | None = None) -> None:
        self.before, self.memory = seconds, memory or {"bytes": 0, "of": ""}
        self.began: float | None = None

    @property
    def seconds(self) -> float:
        """Duration of training in all processes of the run."""
        return self.before + (0.0 if self.began is None else time.perf_counter() - self.began)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.began = time.perf_counter()
        start_memory(args.device)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._update_peak(args)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._update_peak(args)
        self.before, self.began = self.seconds, None

    def _update_peak(self, args: Any) -> None:
        peak = peak_memory(args.device)
        if peak["bytes"] > self.memory["bytes"]:
            self.memory = peak

    def state(self) -> dict[str, Any]:
        """Return the state that a checkpoint stores."""
        return {"args": {"seconds": self.seconds, "memory": self.memory}, "attributes": {}}


def make_trainer(
    preset: Preset,
    model: ReftModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    folder: Path,
    seed: int,
    training: Sequence[Mapping[str, Any]],
    selection: Sequence[Mapping[str, Any]] | None = None,
    metrics: Metrics | None = None,
    console: Console | None = None,
) -> ReftTrainer:
    """Make the trainer of a run, with checkpoints in ``folder``.

    Args:
        preset: gives the ``train`` and ``eval`` settings.
        model: the model to train.
        tokenizer: tokenizer of the base model.
        folder: folder of the run.
        seed: seed of the order of the data and of dropout.
        training: encoded training features.
        selection: features that choose the best checkpoint of all epochs; None for no choice.
        metrics: metrics of predictions; required with ``selection``.
        console: console for the progress; None to show nothing.
    """
    settings, chosen = preset.train, selection is not None
    batches = math.ceil(len(training) / settings.batch_size)
    steps = settings.epochs * math.ceil(batches / settings.accumulate)
    arguments = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=settings.epochs,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=preset.eval.batch_size,
        gradient_accumulation_steps=settings.accumulate,
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        warmup_steps=settings.warmup,
        lr_scheduler_type=settings.schedule,
        max_grad_norm=settings.max_grad_norm,
        optim=settings.optimizer,
        eval_strategy="epoch" if chosen else "no",
        save_strategy="epoch" if chosen else "steps",
        save_steps=max(1, round(SAVE_EVERY * steps)),
        save_total_limit=1,
        load_best_model_at_end=chosen,
        metric_for_best_model=settings.select_by if chosen else None,
        greater_is_better=True if chosen else None,
        logging_steps=max(1, round(LOG_EVERY * steps)),
        include_num_input_tokens_seen="non_padding",
        restore_callback_states_from_checkpoint=True,
        seed=seed,
        use_cpu=model.device.type == "cpu",
        disable_tqdm=True,
        report_to="none",
    )
    trainer = ReftTrainer(
        model,
        arguments,
        ReftDataCollator(tokenizer),
        training,
        selection,
        processing_class=tokenizer,
        compute_metrics=None if metrics is None else _computed(metrics),
        callbacks=[Clock(), *([] if console is None else [ProgressCallback(console)])],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def train(trainer: ReftTrainer, folder: Path) -> Training:
    """Train, resuming from the last checkpoint in ``folder`` if there is one."""
    last = last_checkpoint(folder)
    trainer.train(resume_from_checkpoint=None if last is None else str(last))
    state = trainer.state
    clock = next(
        callback for callback in trainer.callback_handler.callbacks if isinstance(callback, Clock)
    )
    curve = [
        {name: row[name] for name in ("step", "epoch", "loss", "learning_rate")}
        for row in state.log_history
        if "loss" in row
    ]
    tokens = int(state.num_input_tokens_seen)
    return Training(
        steps=state.global_step,
        epochs=float(state.epoch or 0.0),
        seconds=clock.seconds,
        tokens=tokens,
        tokens_per_second=tokens / clock.seconds,
        memory=clock.memory,
        loss=curve[-1]["loss"],
        curve=curve,
        selection=_selection(trainer),
    )


def _selection(trainer: ReftTrainer) -> dict[str, Any]:
    metric = trainer.args.metric_for_best_model
    if not trainer.args.load_best_model_at_end:
        return {}
    rows = [
        {
            name.removeprefix("eval_"): value
            for name, value in row.items()
            if name in ("step", "epoch") or _is_metric(name)
        }
        for row in trainer.state.log_history
        if f"eval_{metric}" in row
    ]
    return {"by": metric, "rows": rows, "best": trainer.state.best_global_step}


def _is_metric(name: str) -> bool:
    timings = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time")
    return name.startswith("eval_") and name.removeprefix("eval_") not in timings


def _computed(metrics: Metrics) -> Callable[[EvalPrediction], dict[str, float]]:
    def compute(prediction: EvalPrediction) -> dict[str, float]:
        logits = prediction.predictions
        return dict(metrics(predicted(logits), np.asarray(prediction.label_ids)))

    return compute


def predicted(logits: Any) -> np.ndarray:
    """Return the class of each row of logits, or the value of a regression (one logit)."""
    rows = np.asarray(logits[0] if isinstance(logits, tuple) else logits, dtype=np.float32)
    return rows[:, 0] if rows.shape[1] == 1 else rows.argmax(axis=1)
