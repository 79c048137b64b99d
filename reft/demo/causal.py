"""Demo of a language model: LoReFT teaches a model that knows facts to answer with a bare name.

``scripts/make_demo_model.py`` made the model and the questions in ``assets/facts``. The model
answers a question about the capital of France with a sentence; the target is the bare name. The
held-out questions are about countries, elements and animals that are not in the training set.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from transformers import (
    AutoModelForCausalLM,
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
from reft.train.evaluate import exact_match, generate_completions
from reft.train.records import Record, read_records
from reft.train.trainer import require_accelerate

ASSETS = Path(__file__).resolve().parent / "assets" / "facts"

CONFIG = ReftConfig(
    intervention="loreft", rank=8, layers="all", positions="f4+l4", task_type="CAUSAL_LM"
)

LEARNING_RATE = 1e-2
BATCH_SIZE = 32
SHOWN = 6


def load_base() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the shipped model in float32 and its tokenizer."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(ASSETS, dtype=torch.float32)
    model.eval().to(device())
    return model, AutoTokenizer.from_pretrained(ASSETS)


def load_records(name: str, limit: int | None = None) -> list[Record]:
    """Read the records of "train" or "heldout"; with a limit, evenly spaced ones."""
    records = read_records(ASSETS / f"{name}.jsonl")
    if limit is None or limit >= len(records):
        return records
    return [records[index * len(records) // limit] for index in range(limit)]


def answers_of(
    model: ReftModel | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    records: Sequence[Record],
    console: Console | None = None,
) -> list[str]:
    """Answer the prompts of records by greedy decoding."""
    prompts = [record["prompt"] for record in records]
    return generate_completions(
        model, tokenizer, prompts, batch_size=64, max_new_tokens=24, console=console
    )


def answers_of_saved(adapter: Path, heldout: int | None = None) -> list[str]:
    """Answer the held-out questions with the shipped model and a saved adapter."""
    base, tokenizer = load_base()
    model = ReftModel.from_pretrained(base, adapter)
    return answers_of(model, tokenizer, load_records("heldout", heldout))


def run(
    output: Path,
    *,
    epochs: float = 6.0,
    seed: int = 0,
    examples: int | None = None,
    heldout: int | None = None,
    goals: Goals | None = None,
    console: Console | None = None,
) -> DemoReport:
    """Train, evaluate, save, reload and time an adapter; print and write the results.

    Args:
        output: folder of ``adapter/``, ``loss.png`` and ``report.json``; created if missing.
        epochs: passes over the training examples.
        seed: seed of the initialisation and of the order of the examples.
        examples, heldout: numbers of training examples and of held-out questions; None for all.
        goals: required results; None for the defaults of :class:`Goals`.
        console: output console; None for the standard output.

    Raises:
        ImportError: accelerate is not installed.
        GoalsMissed: the results miss the goals. They were printed and written.
    """
    began = time.perf_counter()
    require_accelerate()
    console = console or Console()
    output.mkdir(parents=True, exist_ok=True)
    base, tokenizer = load_base()
    training, questions = load_records("train", examples), load_records("heldout", heldout)
    console.print(
        f"A language model of {base.num_parameters() / 1e6:.1f} million parameters answers "
        f"{len(questions)} held-out questions …"
    )
    before = answers_of(base, tokenizer, questions, console)

    set_seed(seed)
    model = get_reft_model(base, CONFIG)
    trained, total = model.get_nb_trainable_parameters()
    console.print(
        f"LoReFT: {CONFIG.positions}, rank {CONFIG.rank}, every layer: {trained:,} of {total:,} "
        f"parameters ({trained / total:.2%}), {len(training)} examples"
    )
    schedule = Schedule(epochs, LEARNING_RATE, BATCH_SIZE, seed)
    done = train(model, ReftDataCollator(tokenizer), training, output, schedule, console)
    after = answers_of(model, tokenizer, questions, console)

    adapter = output / "adapter"
    model.save_pretrained(adapter)
    console.print("The same questions to the saved adapter in a fresh process …")
    reloaded = answers_of_fresh_process("reft.demo.causal", adapter, heldout=heldout)
    curve = output / "loss.png"
    loss_curve(
        curve,
        [row["step"] for row in done.history],
        [row["loss"] for row in done.history],
        title=f"LoReFT learns the bare answer ({trained:,} trainable parameters)",
        every=LOG_STEPS,
    )
    report = DemoReport(
        title="LoReFT on a small language model",
        metric="exact match",
        before=_accuracy(before, questions),
        after=_accuracy(after, questions),
        heldout=len(questions),
        examples=len(training),
        steps=done.steps,
        seed=seed,
        train_seconds=done.seconds,
        trained=trained,
        total=total,
        times=_times(tokenizer, training),
        orthonormality_error=model.orthonormality_error(),
        adapter=str(adapter),
        adapter_bytes=folder_bytes(adapter),
        reloaded_same=count_same(after, reloaded),
        reloaded=len(questions),
        loss_curve=str(curve),
        seconds=time.perf_counter() - began,
        samples=_samples(questions, before, after),
    )
    report.write(output / "report.json")
    report.show(console)
    example = f"reft generate --model {ASSETS} --adapter {adapter} --prompt"
    console.print(f'To ask the model:\n{example} "{questions[0]["prompt"]}"', soft_wrap=True)
    report.require(goals or Goals())
    return report


def _times(tokenizer: PreTrainedTokenizerBase, records: Sequence[Record]) -> StepTimes:
    """Time a training step on a batch and the baseline step, on a new model for each."""
    batch = ReftDataCollator(tokenizer)(records[:BATCH_SIZE])
    batch = {name: value.to(device()) for name, value in batch.items()}
    frozen, _ = load_base()
    model = get_reft_model(load_base()[0], CONFIG).train()
    first = CONFIG.resolve_layers(frozen.config.num_hidden_layers)[0]
    baseline = frozen_step(frozen.train(), frozen.model.layers[first], batch)
    return compare_steps(training_step(model, batch, LEARNING_RATE), baseline, device())


def _accuracy(answers: Sequence[str], records: Sequence[Record]) -> float:
    right = sum(exact_match(a, r["completion"]) for a, r in zip(answers, records, strict=True))
    return right / len(records)


def _samples(
    records: Sequence[Record], before: Sequence[str], after: Sequence[str]
) -> tuple[Sample, ...]:
    """Select answers that are evenly spaced in the held-out questions."""
    count = min(SHOWN, len(records))
    indices = [(2 * number + 1) * len(records) // (2 * count) for number in range(count)]
    return tuple(
        Sample(records[i]["prompt"], records[i]["completion"], before[i], after[i]) for i in indices
    )
